"""Looks at one node of a cluster: what is there, and whether it reaches the others.

Plain Python; ``ray_nodes`` runs one of these on every node, ``outrider check`` one right here
where the cluster is to be local.
"""

import importlib.metadata
import os
import platform
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from outrider.cluster.interfaces import address_of
from outrider.speculation.errors import OutriderError

PACKAGES = ("outrider", "ray", "torch", "grpcio", "transformers", "numpy")
GROUP_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport:
    """A model folder as one node sees it. problem: a line, or nothing if it can be loaded."""

    model: str
    problem: str = ""
    model_type: str = ""
    parameters: int = 0
    vocab_hash: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """What a node is. versions: by package, ``missing`` for one that is not there."""

    host: str
    address: str
    python: str
    system: str
    versions: dict[str, str]
    cpus: int
    memory_gib: float
    gpus: list[str]
    native_kernel: str
    free_port: int
    clock: float


class Probe:
    """One node's."""

    def __init__(self, interface: str | None = None, address: str = "127.0.0.1") -> None:
        """address: the node's, where no interface is chosen.

        Raises:
            InvalidConfigError: the node has no such interface.
        """
        self.address = address if interface is None else address_of(interface)
        self._store: Any = None

    def report(self) -> NodeReport:
        """Versions, devices, and a port that can be listened on."""
        import torch

        from outrider.kernels.native.library import load

        kernel = load()
        return NodeReport(
            host=socket.gethostname(),
            address=self.address,
            python=platform.python_version(),
            system=f"{platform.system()} {platform.release()} {platform.machine()}",
            versions={name: _version(name) for name in PACKAGES},
            cpus=len(os.sched_getaffinity(0)),
            memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
            gpus=[torch.cuda.get_device_name(each) for each in range(torch.cuda.device_count())],
            native_kernel="PyTorch's own" if kernel is None else kernel.selected(),
            free_port=self._free_port(),
            clock=time.time(),
        )

    def models(self, names: Sequence[str]) -> list[ModelReport]:
        """Whether each model can be loaded here, without loading its weights."""
        return [_model_report(name) for name in names]

    def clock(self) -> float:
        """This node's idea of the time, in seconds since 1970."""
        return time.time()

    def listen(self) -> str:
        """Starts what ``round_trip`` of another node talks to; its address."""
        from outrider.actors.grpc_probe import EchoServer

        self._echo = EchoServer(self.address)
        return self._echo.address

    def round_trip(self, address: str) -> float:
        """Median seconds of a small gRPC call to another node's ``listen``.

        Raises:
            ConnectionError: it does not answer.
        """
        from outrider.actors.grpc_probe import round_trip

        return round_trip(address)

    def open_group(self) -> int:
        """Listens for the other members of a process group; the port."""
        import torch.distributed as dist

        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            self.address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=GROUP_SECONDS)
        )
        port: int = self._store.port
        return port

    def all_reduce(self, rank: int, size: int, address: str, port: int) -> float:
        """Joins a gloo group and adds a megabyte up; seconds of one all-reduce.

        Raises:
            RuntimeError: the group does not come together.
        """
        import torch
        import torch.distributed as dist

        limit = timedelta(seconds=GROUP_SECONDS)
        store = self._store
        if rank:
            store = dist.TCPStore(address, port, is_master=False, timeout=limit)  # type: ignore[attr-defined]
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface_with(self.address))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
        try:
            values = torch.ones(1 << 18)
            dist.all_reduce(values)
            began = time.perf_counter()
            dist.all_reduce(values)
            return time.perf_counter() - began
        finally:
            dist.destroy_process_group()

    def _free_port(self) -> int:
        with socket.socket() as listener:
            listener.bind((self.address, 0))
            port: int = listener.getsockname()[1]
            return port


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _model_report(name: str) -> ModelReport:
    from outrider.models.config import load_config
    from outrider.models.inflate import count_parameters
    from outrider.models.resolve import resolve_model
    from outrider.models.tokenizer import Tokenizer
    from outrider.models.weights import Checkpoint

    try:
        folder = resolve_model(name)
        config = load_config(folder)
        parameters = count_parameters(config, Checkpoint(folder))
        vocabulary = Tokenizer.load(folder).fingerprint
    except OutriderError as error:
        return ModelReport(model=name, problem=str(error))
    return ModelReport(model=name, model_type=config.model_type, parameters=parameters, vocab_hash=vocabulary)


def _interface_with(address: str) -> str:
    """The network interface that has this address."""
    for _, name in socket.if_nameindex():
        try:
            if address_of(name) == address:
                return name
        except OutriderError:
            continue
    return "lo"
