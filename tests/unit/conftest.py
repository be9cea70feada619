"""What several files of tests stand on."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from instruments.native_linears import LAYERS, NATIVE
from sockets import connecting

from outrider.actors.grpc_client import DraftClient
from outrider.actors.io_thread import IoThread


@pytest.fixture(scope="module")
def io() -> Iterator[IoThread]:
    """One thread for all network traffic of a module's tests."""
    thread = IoThread()
    yield thread
    thread.close()


@pytest.fixture
def client(io: IoThread) -> Iterator[DraftClient]:
    """A target's client in that thread."""
    with connecting(io) as made:
        yield made


@pytest.fixture
def linear_path(request: pytest.FixtureRequest) -> Iterator[None]:
    """Native linear layers by one instruction set; see ``instruments.native_linears``."""
    with _selected(NATIVE, request.param):
        yield


@pytest.fixture(params=LAYERS.paths() if LAYERS else [])
def layers_path(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is native between linear layers, by each instruction set."""
    with _selected(LAYERS, request.param):
        yield


@contextmanager
def _selected(module: ModuleType | None, path: str) -> Iterator[None]:
    assert module is not None
    before = module.selected()
    module.select(path)
    yield
    module.select(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """PyTorch's number of threads, which the test may change."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
