"""Clusters that outlive the command that started them, and how to find them.

On a Ray cluster the controller is a detached actor: its name is all that is needed. Where Ray
runs on this machine alone, a process of ours keeps it, and a private file says how to reach it.
"""

import json
import os
import secrets
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from outrider.actors.security import Security
from outrider.cluster.cluster_config import ClusterConfig
from outrider.cluster.cluster_security import TOKEN_VARIABLE
from outrider.cluster.ray_runtime import attached_ray, local_ray, read_secret
from outrider.speculation.errors import ClusterError

if TYPE_CHECKING:
    from outrider.cluster.ray_client import RayController

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A local cluster that is up. pid: of the process that keeps Ray. token: Ray's."""

    pid: int
    address: str
    token: str | None

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True


@contextmanager
def connect(config: ClusterConfig, *, debug: bool = False) -> Iterator["RayController"]:
    """The standing cluster of that name, or one for the length of the block.

    Raises:
        ClusterError: Ray or room is missing.
        WorkerError: a process could not start.
    """
    standing = find_local(config.name) if config.address == "local" else None
    if standing is not None:
        with standing_ray(standing, debug=debug):
            yield _found(config.name)
    elif config.address == "local":
        with local_ray(debug=debug), own_controller(config) as controller:
            yield controller
    else:
        with attached(config, debug=debug):
            from outrider.cluster.ray_client import find_controller

            found = find_controller(config.name)
            if found is not None:
                yield found
                return
            with own_controller(config) as controller:
                yield controller


@contextmanager
def standing_controller(config: ClusterConfig) -> Iterator["RayController"]:
    """The standing cluster of that name.

    Raises:
        ClusterError: there is none.
    """
    missing = ClusterError(f"no cluster called {config.name!r} is up; 'outrider up' starts one")
    if config.address == "local":
        standing = find_local(config.name)
        if standing is None:
            raise missing
        with standing_ray(standing):
            yield _found(config.name)
        return
    with attached(config):
        from outrider.cluster.ray_client import find_controller

        found = find_controller(config.name)
        if found is None:
            raise missing
        yield found


@contextmanager
def standing_ray(standing: Standing, *, debug: bool = False) -> Iterator[None]:
    """The Ray of a local cluster that is up."""
    with attached_ray(standing.address, standing.token, debug=debug):
        yield


@contextmanager
def ray_of(config: ClusterConfig, *, debug: bool = False) -> Iterator[None]:
    """The Ray of the standing cluster of that name, or the one that it would be started on.

    Raises:
        ClusterError: there is none, and none can be started.
    """
    standing = find_local(config.name) if config.address == "local" else None
    if standing is not None:
        with standing_ray(standing, debug=debug):
            yield
    elif config.address == "local":
        with local_ray(debug=debug):
            yield
    else:
        with attached(config, debug=debug):
            yield


@contextmanager
def attached(config: ClusterConfig, *, debug: bool = False) -> Iterator[None]:
    """The Ray cluster that the configuration names."""
    path = config.security.ray_token_file
    with attached_ray(config.address, None if path is None else read_secret(path), debug=debug):
        yield


@contextmanager
def own_controller(config: ClusterConfig, *, detached: bool = False) -> Iterator["RayController"]:
    """A new cluster on the Ray that this process is connected to; ready when the block begins.

    It ends with the block; ``detached``: only if the block fails.
    """
    from outrider.cluster.ray_client import start_controller

    host = LOOPBACK if config.address == "local" and config.network.interface is None else None
    controller = start_controller(config, cluster_security_of(config), host=host, detached=detached)
    try:
        controller.wait_ready(config.limits.start_seconds)
        yield controller
    except BaseException:
        controller.shut_down()
        raise
    if not detached:
        controller.shut_down()


def cluster_security_of(config: ClusterConfig) -> Security:
    """What connecting to its draft workers takes; the token is fresh unless one was chosen.

    Raises:
        InvalidConfigError: a file cannot be used.
    """
    given = config.security
    token = os.environ.get(TOKEN_VARIABLE) or secrets.token_hex(16)
    paths = {"ca": given.tls_ca, "certificate": given.tls_certificate, "key": given.tls_key}
    return Security(
        token=token if given.token_file is None else read_secret(given.token_file),
        **{name: None if path is None else Path(path) for name, path in paths.items()},
    )


def find_local(name: str) -> Standing | None:
    """The local cluster of that name, if it is up."""
    try:
        text = state_file(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    standing = Standing(**json.loads(text))
    return standing if standing.alive else None


def remember(name: str, standing: Standing) -> None:
    """Lets other commands of this user find a cluster."""
    path = state_file(name)
    temporary = path.with_suffix(".new")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(asdict(standing), file)
    temporary.replace(path)


def forget(name: str) -> None:
    """The opposite of ``remember``."""
    state_file(name).unlink(missing_ok=True)


def end_local(standing: Standing, seconds: float) -> None:
    """Ends the process that keeps it, and all with it.

    Raises:
        ClusterError: it does not end in time.
    """
    with suppress(ProcessLookupError):
        os.kill(standing.pid, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while standing.alive:
        if time.monotonic() > deadline:
            raise ClusterError(f"process {standing.pid} does not end within {seconds:g} s")
        time.sleep(0.05)


def state_file(name: str) -> Path:
    """Where a local cluster is remembered.

    Raises:
        ClusterError: see ``log_file``.
    """
    return _state_folder() / f"{name}.json"


def log_file(name: str) -> Path:
    """What the process that keeps a local cluster has to say.

    Raises:
        ClusterError: somebody else owns the folder.
    """
    return _state_folder() / f"{name}.log"


def _state_folder() -> Path:
    """Only this user may look into it: a token is in there."""
    folder = Path(tempfile.gettempdir()) / f"outrider-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise ClusterError(f"{folder} must be a folder of yours that no one else can read")
    return folder


def _found(name: str) -> "RayController":
    from outrider.cluster.ray_client import find_controller

    found = find_controller(name)
    if found is None:
        raise ClusterError(f"the standing cluster {name!r} has lost its controller; 'outrider down' it")
    return found
