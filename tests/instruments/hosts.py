"""Hosts with addresses and links of their own, on this machine: network namespaces on one bridge."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from instruments.processes import until

SECONDS = 60.0
"""For a command or for Ray to start, on a busy machine."""
PORT = 6379
OBJECT_STORE_BYTES = 100_000_000
QUICK_TO_MISS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""For Ray's head, as Outrider sets it where it starts Ray itself."""


class NotPermittedError(Exception):
    """This process may not make namespaces."""


def ip(*words: str) -> str:
    """Runs ``ip``; what it prints.

    Raises:
        subprocess.CalledProcessError: it fails.
    """
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=SECONDS, check=True)
    return done.stdout


class Host:
    """A namespace with one link, ``eth0``, to all others."""

    def __init__(self, tag: str, number: int, subnet: str) -> None:
        self.namespace, self.port = f"{tag}n{number}", f"{tag}p{number}"
        self.address = f"{subnet}.{number}"

    def command(self, *words: str) -> list[str]:
        """The command line that runs these words here."""
        return ["ip", "netns", "exec", self.namespace, *words]

    @property
    def pids(self) -> list[int]:
        """Of all processes that run here."""
        return [int(each) for each in ip("netns", "pids", self.namespace).split()]

    def processes(self, *names: str) -> list[str]:
        """Command lines that contain one of these names."""
        lines = []
        for pid in self.pids:
            with suppress(OSError):
                lines.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
        return [line for line in lines if any(name in line for name in names)]

    def kill(self) -> None:
        """Ends all its processes at once, as if the power failed."""

        def is_dead() -> bool:
            for pid in (pids := self.pids):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not pids

        assert until(is_dead), f"processes of {self.namespace} survive"

    def cut(self) -> None:
        """Whatever is sent to it or from it is lost from now on."""
        ip("-n", self.namespace, "link", "set", "eth0", "down")

    def restore(self) -> None:
        """Mends what ``cut`` did."""
        ip("-n", self.namespace, "link", "set", "eth0", "up")
        # Leads nowhere, but without one Ray asks the name service who it is.
        ip("-n", self.namespace, "route", "replace", "default", "dev", "eth0")


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many hosts, which reach each other and nothing else. Nothing of them is left afterwards.

    Raises:
        NotPermittedError: by a plain line.
    """
    if os.geteuid() or shutil.which("ip") is None:
        raise NotPermittedError("network namespaces need root and the command ip")
    tag = f"or{secrets.token_hex(2)}"
    subnet = _free_subnet()
    made = [Host(tag, number, subnet) for number in range(1, count + 1)]
    try:
        try:
            _connect(f"{tag}b", made)
        except subprocess.CalledProcessError as error:
            raise NotPermittedError(f"no network namespace can be made: {error.stderr.strip()}") from error
        yield made
    finally:
        _remove(f"{tag}b", made)
        left = [each for each in (*_links(), *_namespaces()) if each.startswith(tag)]
        assert not left, f"left behind: {left}"


def _connect(bridge: str, made: Sequence[Host]) -> None:
    ip("link", "add", bridge, "type", "bridge")
    ip("link", "set", bridge, "up")
    for host in made:
        ip("netns", "add", host.namespace)
        ip(*f"link add {host.port} type veth peer name eth0 netns {host.namespace}".split())
        ip(*f"link set {host.port} master {bridge} up".split())
        ip(*f"-n {host.namespace} addr add {host.address}/24 dev eth0".split())
        ip(*f"-n {host.namespace} link set lo up".split())
        host.restore()


def _remove(bridge: str, made: Sequence[Host]) -> None:
    present = _namespaces()
    for host in made:
        if host.namespace in present:
            host.kill()
    # Explicitly: a namespace is only gone when the last socket in it is.
    for link in (*(host.port for host in made), bridge):
        if link in _links():
            ip("link", "delete", link)
    for host in made:
        if host.namespace in present:
            ip("netns", "delete", host.namespace)


def _links() -> list[str]:
    """Of the root namespace."""
    return [line.split(": ")[1].partition("@")[0] for line in ip("-o", "link").splitlines()]


def _namespaces() -> list[str]:
    return [line.split()[0] for line in ip("netns", "list").splitlines()]


def _free_subnet() -> str:
    taken = ip("-o", "addr") + ip("route")
    for _ in range(100):
        subnet = f"10.77.{secrets.randbelow(256)}"
        if f"{subnet}." not in taken:
            return subnet
    raise NotPermittedError("no subnet is free")


class RayHosts:
    """Ray on hosts, the first of which is its head. Made by ``ray_hosts``."""

    def __init__(self, made: Sequence[Host], folder: Path) -> None:
        self.hosts, self.folder = made, folder
        self.address = f"{made[0].address}:{PORT}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = {
            **kept,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            # Workers that nobody needs yet only take time.
            "RAY_prestart_worker_first_driver": "0",
        }
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, host: Host, labels: Mapping[str, str], *, num_cpus: int) -> subprocess.Popen[bytes]:
        """Begins to start a node; it ends with ``Host.kill``, or when Ray gives it up."""
        head = host is self.hosts[0]
        where = ["--head", f"--port={PORT}", "--include-dashboard=false", "--no-monitor"]
        words = [
            *(where if head else [f"--address={self.address}"]),
            f"--node-ip-address={host.address}",
            # Two that start at the same moment would choose the same names for their sockets.
            f"--temp-dir={self.folder}/{host.namespace}",
            f"--num-cpus={num_cpus}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--labels=" + ",".join(f"{name}={value}" for name, value in labels.items()),
            "--disable-usage-stats",
            "--include-log-monitor=false",
            "--block",
        ]
        with open(self.folder / f"{host.namespace}-{len(self._started)}.log", "wb") as log:
            node = subprocess.Popen(
                host.command(sys.executable, "-m", "ray.scripts.scripts", "start", *words),
                env=self.environment | (QUICK_TO_MISS if head else {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(node)
        return node

    def popen(self, *words: str) -> subprocess.Popen[str]:
        """Runs Python with these words on the head."""
        return subprocess.Popen(
            self.hosts[0].command(sys.executable, *words),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str, seconds: float = SECONDS) -> subprocess.CompletedProcess[str]:
        """Runs Python with these words on the head, to its end."""
        with self.popen(*words) as process:
            try:
                out, error = process.communicate(timeout=seconds)
            finally:
                process.kill()
        return subprocess.CompletedProcess(words, process.returncode, out, error)

    @property
    def num_started(self) -> int:
        """Nodes that have joined, also if they are gone by now."""
        return sum("Ray runtime started" in path.read_text() for path in self.folder.glob("*.log"))

    def logs(self) -> str:
        """The end of what the nodes said, for people."""
        return "\n".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("*.log")))

    def wait(self) -> None:
        """Until all that was started has ended."""
        for node in self._started:
            node.wait(timeout=SECONDS)


@contextmanager
def ray_hosts(count: int) -> Iterator[RayHosts]:
    """So many hosts, on which no Ray runs yet.

    Raises:
        NotPermittedError: see ``hosts``.
    """
    # Paths of sockets may have about a hundred characters.
    with tempfile.TemporaryDirectory(prefix="or-", dir="/tmp") as folder:
        with hosts(count) as made:
            all_of_it = RayHosts(made, Path(folder))
            yield all_of_it
        all_of_it.wait()
