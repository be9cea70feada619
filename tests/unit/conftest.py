"""What several tests of the transport stand on."""

from collections.abc import Iterator

import pytest
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
