"""The server's own life: what it serves may end before it is told to."""

import asyncio
import threading

import pytest

from outrider.cluster.api.service import Service
from outrider.cluster.server import listening_socket, serve
from outrider.speculation.errors import TargetGroupError


def test_a_server_whose_engine_failed_ends_and_says_why() -> None:
    ready = threading.Event()

    async def failure() -> None:
        while not ready.is_set():
            await asyncio.sleep(0)
        raise RuntimeError("rank 1 was killed")

    async def make() -> tuple[Service, "asyncio.Future[None]"]:
        return Service([]), asyncio.ensure_future(failure())

    with (
        listening_socket("127.0.0.1", 0) as listener,
        pytest.raises(TargetGroupError, match="the engine ended: rank 1 was killed"),
    ):
        serve(listener, make, keys=[], max_body=1000, ready=ready.set)
