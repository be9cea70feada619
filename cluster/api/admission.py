"""How many requests may be in flight: a bounded queue, and an answer at once for whoever finds it full."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from outrider.speculation.errors import OutriderError

LEARNING_RATE = 0.1
LONGEST_ADVICE = 60
"""Seconds that a client is told to wait at most."""


class OverloadedError(OutriderError):
    """There is no room now. retry_after: seconds after which there may be."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(f"{reason}; try again in {retry_after} s")
        self.retry_after = retry_after


class Admission:
    """Counts texts from their admission to their end.

    slots: how many the targets serve at once, now. waiting_per_slot: texts that may wait for each of these;
    a call is let in while there is room for one of its texts.
    """

    def __init__(
        self,
        slots: Callable[[], int],
        *,
        waiting_per_slot: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots, self._waiting_per_slot, self._clock = slots, waiting_per_slot, clock
        self._in_flight = 0
        self._seconds = 1.0
        """That a text takes from admission to end, by experience."""

    @property
    def in_flight(self) -> int:
        """Texts that are being served or wait."""
        return self._in_flight

    def require_room(self) -> None:
        """
        Raises:
            OverloadedError: there is none.
        """
        slots = self._slots()
        if self._in_flight >= slots * (1 + self._waiting_per_slot):
            raise OverloadedError(f"{self._in_flight} texts are being served or wait", self._advice(slots))

    @contextmanager
    def entering(self) -> Iterator[None]:
        """While a call is made ready: it counts as one text until it is admitted with all that it has."""
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    @contextmanager
    def admitted(self, texts: int) -> Iterator[None]:
        """For as long as a call of so many texts lasts."""
        began = self._clock()
        self._in_flight += texts
        try:
            yield
        finally:
            self._in_flight -= texts
            self._seconds += LEARNING_RATE * (self._clock() - began - self._seconds)

    def _advice(self, slots: int) -> int:
        """When about half of the queue will have been served."""
        half = self._seconds * self._waiting_per_slot / (1 + self._waiting_per_slot) / 2
        return min(LONGEST_ADVICE, max(1, math.ceil(half))) if slots else 1
