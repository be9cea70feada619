"""Ctrl-C in moments in which it would leave things behind."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: nothing is started without being known to its owner.

    A third one goes through, for whoever has lost patience with what hangs.
    """
    handler = signal.getsignal(signal.SIGINT)
    # Only a function of the main thread's can interrupt it, and nothing interrupts other threads.
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append((number, frame))
        if len(came) > 2:
            handler(number, frame)

    try:
        signal.signal(signal.SIGINT, note)
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


def wait_for_signal() -> None:
    """Until SIGINT or SIGTERM, which then is an end in order."""
    told = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda *_: told.set()) for number in numbers]
    try:
        told.wait()
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
