"""Step events on their way from an engine's thread to callers on an event loop."""

import asyncio
import time
from collections.abc import Sequence

from outrider.speculation.request import StepEvent


class Lots:
    """One caller's events: the first at once, then a lot every ``interval`` seconds, and an end at once."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._arrived: asyncio.Queue[list[StepEvent]] = asyncio.Queue()
        self._gathered: list[StepEvent] = []
        self._due = 0.0

    def gather(self, events: list[StepEvent]) -> None:
        """On the engine's thread: what one step brought."""
        self._gathered += events
        if any(map(is_last, events)):
            self._due = 0.0

    def is_due(self, now: float, *, early: bool = False) -> bool:
        """Whether a lot is to be sent. early: whether it may go with somebody else's."""
        return now >= self._due - (self._interval / 2 if early else 0.0)

    def close_lot(self, now: float) -> list[StepEvent]:
        """What has been gathered; the next lot begins."""
        self._due = now + self._interval
        lot, self._gathered = self._gathered, []
        return lot

    def arrive(self, lot: list[StepEvent]) -> None:
        """On the event loop; an empty lot makes ``take`` return as well."""
        self._arrived.put_nowait(lot)

    async def take(self) -> list[StepEvent]:
        """Everything that has arrived, at least one lot."""
        events = await self._arrived.get()
        # A step may have ended while the last one's events were on their way.
        while not self._arrived.empty():
            events += self._arrived.get_nowait()
        return events


class Handover:
    """Carries everybody's lots to the event loop; but for its making, used on the engine's thread.

    Waking the loop takes time from the engine, for Python's threads take turns. So there is one call for all
    that is due after a step, and what has waited for half of its interval goes along: streams that began
    at different times soon go together.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._filled: dict[Lots, None] = {}
        """Those that have gathered something, in the order in which they began to."""

    def bring(self, lots: Lots, events: list[StepEvent]) -> None:
        """What one step brought a caller."""
        lots.gather(events)
        self._filled[lots] = None

    def forget(self, lots: Lots) -> None:
        """Its caller has gone."""
        self._filled.pop(lots, None)

    def send(self) -> None:
        """After each step."""
        now = time.monotonic()
        if not any(lots.is_due(now) for lots in self._filled):
            return
        going = [lots for lots in self._filled if lots.is_due(now, early=True)]
        for lots in going:
            del self._filled[lots]
        self._loop.call_soon_threadsafe(_deliver, [(lots, lots.close_lot(now)) for lots in going])


def is_last(event: StepEvent) -> bool:
    """Whether a request gets no further events."""
    return event.completion is not None or event.error is not None


def _deliver(sent: Sequence[tuple[Lots, list[StepEvent]]]) -> None:
    for lots, lot in sent:
        lots.arrive(lot)
