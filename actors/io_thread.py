"""One thread with one asyncio loop, for all network traffic of a process.

grpc.aio supports one event loop per process, and none that existed before a fork, so a process
that both serves and connects does it in the same one. Other threads compute meanwhile.
"""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

_Result = TypeVar("_Result")

START_SECONDS = 10.0


class IoThread:
    """Runs from construction until ``close``."""

    def __init__(self) -> None:
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._main, name="outrider-io", daemon=True)
        self._thread.start()
        self._loop = self._started.result(START_SECONDS)

    def run(self, work: Coroutine[Any, Any, _Result], seconds: float | None = None) -> _Result:
        """Runs ``work`` in the loop and waits for it; for other threads.

        Raises:
            TimeoutError: it takes longer than ``seconds``; it goes on.
        """
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)

    def close(self) -> None:
        """Cancels what still runs in the loop and joins the thread; may be called twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._over.set)
            self._thread.join()

    def _main(self) -> None:
        # The runner cancels and awaits all remaining tasks before it closes the loop.
        with asyncio.Runner() as runner:
            runner.run(self._until_closed())

    async def _until_closed(self) -> None:
        self._started.set_result(asyncio.get_running_loop())
        await self._over.wait()


class SharedIo:
    """The thread of all targets in this process: started for the first, closed with the last.

    Two loops at a time would not do: grpc.aio hands events of one to the other, even to a closed one.
    """

    # Reentrant: a client may be collected, and so closed, while another one is made.
    _lock = threading.RLock()
    _thread: IoThread | None = None
    _users = 0

    @classmethod
    def acquire(cls) -> IoThread:
        """The thread; ``release`` it once."""
        with cls._lock:
            if cls._thread is None:
                cls._thread = IoThread()
            cls._users += 1
            return cls._thread

    @classmethod
    def release(cls) -> None:
        """One user less."""
        with cls._lock:
            cls._users -= 1
            if not cls._users and cls._thread is not None:
                thread, cls._thread = cls._thread, None
                thread.close()
