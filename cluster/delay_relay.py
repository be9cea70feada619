"""A relay that holds up what passes through it, for measuring what a network between two processes costs.

Every piece of data leaves a fixed time after it came, in order; how much there is makes no difference.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from outrider.actors.io_thread import IoThread

CHUNK = 1 << 16
Delay = Callable[[], float]
"""Seconds that the next piece of data takes one way."""


class DelayRelay:
    """Forwards TCP connections to ``address`` (host:port), each way with a delay; ``close`` ends them.

    one_way: seconds, or what draws them for each piece; a later piece never overtakes an earlier one.
    """

    def __init__(self, address: str, one_way: float | Delay) -> None:
        host, _, port = address.rpartition(":")
        self._target = host.strip("[]"), int(port)
        self._delay: Delay = one_way if callable(one_way) else lambda: one_way
        self._connections: set[asyncio.Task[None]] = set()
        self._io = IoThread()
        self._server = self._io.run(self._listen())
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        """Closes all connections."""
        self._io.run(self._end())
        self._io.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._connected, "127.0.0.1", 0)

    async def _end(self) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            try:
                async with asyncio.TaskGroup() as ways:
                    ways.create_task(self._forward(reader, far_writer))
                    ways.create_task(self._forward(far_reader, writer))
            finally:
                far_writer.close()
        except* (OSError, asyncio.CancelledError):
            pass  # one side is gone, and with it the connection
        finally:
            writer.close()
            self._connections.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One way of one connection, until its end has passed."""
        due_data: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def take_in() -> None:
            due = 0.0
            while True:
                data = await reader.read(CHUNK)
                due = max(due, time.monotonic() + self._delay())
                due_data.put_nowait((due, data))
                if not data:
                    return

        async with asyncio.TaskGroup() as both:
            both.create_task(take_in())
            while True:
                due, data = await due_data.get()
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if not data:
                    with contextlib.suppress(OSError):
                        writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()
