"""Finds or starts Ray for a cluster, before anything imports it: its settings are environment variables.

Ray started here listens for processes that hold its token, keeps its files in a folder of its own
and takes them along when it ends; nothing is written to the user's home.
"""

import contextlib
import importlib.metadata
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outrider.cluster.interruption import uninterrupted
from outrider.speculation.errors import ClusterError, InvalidConfigError

OLDEST_RAY = (2, 55)
NAMESPACE = "outrider"
CONNECT_SECONDS = 3.0
OBJECT_STORE_BYTES = 100 << 20
"""Only small messages pass through Ray."""
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Else a host that is gone is believed in for a minute.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


def require_ray() -> None:
    """
    Raises:
        ClusterError: Ray is missing or too old.
    """
    wanted = ".".join(map(str, OLDEST_RAY))
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        raise ClusterError(f"Ray is not installed; a cluster needs ray {wanted} or newer") from None
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_RAY:
        raise ClusterError(f"ray {version} is too old; a cluster needs {wanted} or newer")


@contextmanager
def local_ray(*, debug: bool = False) -> Iterator[None]:
    """Ray on this machine alone, for as long as the block lasts.

    debug: shows what the cluster's processes log.

    Raises:
        ClusterError: it cannot be started, or this process is connected to one already.
    """
    require_ray()
    _refuse_second_connection()
    folder = tempfile.mkdtemp(prefix="outrider-", dir=_short_folder())
    _choose_token()
    try:
        with _environment(_SETTINGS):
            import ray

            try:
                # What an interruption leaves half started would not be ended by Ray.
                with _as_cluster_error("Ray cannot be started"), uninterrupted():
                    ray.init(
                        address="local",
                        include_dashboard=False,
                        log_to_driver=debug,
                        configure_logging=False,
                        object_store_memory=OBJECT_STORE_BYTES,
                        namespace=NAMESPACE,
                        _temp_dir=folder,
                    )
                _keep_quiet(unless=debug)
                yield
            finally:
                ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def attached_ray(address: str, token: str | None, *, debug: bool = False) -> Iterator[None]:
    """The Ray cluster at ``address``, or ``auto``: the one that this machine belongs to.

    token: what it asks for; without one the environment decides.

    Raises:
        ClusterError: there is none, or it refuses the token.
    """
    require_ray()
    _refuse_second_connection()
    settings = dict(_SETTINGS)
    if token is not None:
        settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    with _environment(settings):
        import ray

        with _as_cluster_error(f"no Ray cluster can be reached at {address}"):
            _require_listener(address)
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=debug, configure_logging=False)
        _keep_quiet(unless=debug)
        try:
            yield
        finally:
            ray.shutdown()


def read_secret(path: str) -> str:
    """A file's only line.

    Raises:
        InvalidConfigError: it cannot be read, or is empty.
    """
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
        raise InvalidConfigError(f"the token file {path} cannot be read: {reason}") from None
    if not text:
        raise InvalidConfigError(f"the token file {path} is empty")
    return text


def _choose_token() -> None:
    """Keeps other users' processes out of the Ray that this one starts.

    The choice takes effect when Ray is imported, once for the process: a program that imported
    it before has chosen itself.
    """
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if "ray" not in sys.modules and not any(name in os.environ for name in names):
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}


def _require_listener(address: str) -> None:
    """Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()


def _refuse_second_connection() -> None:
    ray: Any = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        raise ClusterError("this process is connected to a Ray cluster already; close that one first")


def _keep_quiet(*, unless: bool) -> None:
    """Ray tells of dead processes on standard output, where only texts belong, whatever it was asked."""
    import ray._private.worker

    vars(ray._private.worker)["_worker_logs_enabled"] = unless


def _short_folder() -> str | None:
    """Where Ray's sockets fit: their paths may have about a hundred characters."""
    return None if len(tempfile.gettempdir()) < 40 else "/tmp"


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Variables that are not set yet, while Ray runs: its processes inherit them."""
    fresh = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(fresh)
    try:
        yield
    finally:
        for name in fresh:
            os.environ.pop(name, None)


@contextmanager
def _as_cluster_error(what: str) -> Iterator[None]:
    """Ray raises all sorts of exceptions, with pages of text; people get the first line."""
    try:
        # It prints about its progress, and what it prints is not for our users.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
        lines = str(error).strip().splitlines()
        raise ClusterError(f"{what}: {lines[0] if lines else type(error).__name__}") from error
