"""Bounded queues between the threads that compute and the loop that does the network's work."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from outrider.actors.transport import Disconnected, Overflowed, Received
from outrider.speculation.errors import SlowPeerError


class Outbox:
    """Encoded messages from any thread to the writer of one stream; made inside the loop.

    max_bytes: of messages not written yet. More of them end the stream: whoever reads so
    slowly would only learn of things long past.
    """

    def __init__(self, max_bytes: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._full = asyncio.Event()
        self._max_bytes = max_bytes
        self._pending_bytes = 0
        self._closed = False

    def put(self, data: bytes) -> bool:
        """Queues one message without waiting; False after ``close``."""
        if self._closed:
            return False
        try:
            self._loop.call_soon_threadsafe(self._add, data)
        except RuntimeError:  # the loop has been closed in the meantime
            return False
        return True

    def close(self) -> None:
        """Takes nothing any more."""
        self._closed = True

    async def write_to(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Writes all that comes, in order, until cancelled.

        Raises:
            SlowPeerError: more than ``max_bytes`` were waiting.
        """
        await first_of(self._write_all(write), self._full.wait())
        raise SlowPeerError(f"more than {self._max_bytes} bytes were waiting to be read")

    def _add(self, data: bytes) -> None:
        self._pending_bytes += len(data)
        if self._pending_bytes > self._max_bytes:
            self._full.set()
            self._closed = True
        else:
            self._queue.put_nowait(data)

    async def _write_all(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        while True:
            data = await self._queue.get()
            await write(data)
            self._pending_bytes -= len(data)


class Bell:
    """Wakes the thread that waits for any of several inboxes; implements ``Arrivals``."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        """Its lock guards all inboxes of the bell."""
        self.filled: set[Inbox] = set()

    def wait(self, seconds: float) -> None:
        """Returns when an inbox holds something, or after ``seconds``."""
        with self.changed:
            self.changed.wait_for(lambda: self.filled, seconds)


class Inbox:
    """What arrived on one channel and was not taken yet.

    At most ``max_messages`` and ``max_bytes`` (on the wire) are kept; what comes then is thrown
    away, with one ``Overflowed`` in its place.

    outbox: of the stream that the events taken last belong to; None before and after one.
    """

    def __init__(self, bell: Bell, *, max_messages: int, max_bytes: int) -> None:
        self._bell = bell
        self._max_messages, self._max_bytes = max_messages, max_bytes
        self.outbox: Outbox | None = None
        self._events: list[Received] = []
        self._outbox: Outbox | None = None
        self._bytes = 0
        self._overflowed = False
        self._closed = False

    def has_room(self, num_bytes: int) -> bool:
        """Whether a message may be ``put``; if not, an ``Overflowed`` has been noted.

        Asked before a message is decoded, so that a flood costs little.
        """
        with self._bell.changed:
            fits = len(self._events) < self._max_messages and self._bytes + num_bytes <= self._max_bytes
            if not fits and not self._overflowed:
                self._overflowed = True
                self._add(Received(Overflowed(), 0))
            return fits

    def put(self, received: Received, outbox: Outbox | None = None) -> None:
        """Adds what arrived, from the I/O thread. outbox: of the stream that begins with it."""
        with self._bell.changed:
            self._bytes += received.num_bytes
            self._outbox = outbox or self._outbox
            self._add(received)

    def lose(self, reason: str, *, lasting: bool = False) -> None:
        """The stream is gone: what it brought and nobody took goes with it.

        So a worker that comes and goes for hours fills nothing.
        """
        with self._bell.changed:
            self._clear()
            self._outbox = None
            self._add(Received(Disconnected(reason, lasting), 0))

    def take(self) -> list[Received]:
        """Everything, in order; from the one thread that receives."""
        with self._bell.changed:
            events, self.outbox = self._events, self._outbox
            self._clear()
            return events

    def close(self) -> None:
        """Empties the inbox for good."""
        with self._bell.changed:
            self._clear()
            self._outbox = None
            self._closed = True

    def _add(self, received: Received) -> None:
        if not self._closed:
            self._events.append(received)
            self._bell.filled.add(self)
            self._bell.changed.notify_all()

    def _clear(self) -> None:
        self._events = []
        self._bytes = 0
        self._overflowed = False
        self._bell.filled.discard(self)


async def first_of(*works: Coroutine[Any, Any, Any]) -> None:
    """Runs all until one ends, and cancels the others; raises what the first to end raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        if task in done:
            task.result()
