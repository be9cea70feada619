"""At which draft worker a request is drafted for, and when it moves to another: by expected speed.

All that a target sees of a worker is how soon commits are answered and how often growth comes. That
tells of the way there, of the worker's model and machine, and of what other targets ask of it. How much one
request more would slow it down is assumed, not known, and measured as soon as it is there.

No clock and no I/O: numbers come in, a decision comes out.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

CROWDED = 4.0
"""With as many other sessions as it takes, a worker is expected to be so many times slower, plus once."""
CLEARLY = 1.5
"""How many times faster than here a request should be drafted for elsewhere to be moved."""
LEAST_GAIN = 0.005
"""Seconds by which it should be faster, too; less is not worth a move."""
LOOK_EVERY = 0.5
PATIENCE = 2.0
"""Seconds for which another worker must have been clearly faster."""
SETTLED = 2.0
"""Seconds that a request stays where it is at the least."""
TRIAL_PAUSE = 10.0
"""Seconds between moves to workers of which nothing is known, or no more."""
FORGET = 120.0
"""Seconds after which what was measured of a worker that is not used says no more of it."""

Worker = TypeVar("Worker", bound=Hashable)


def slowdown(others: int, room: int) -> float:
    """How many times slower a worker is with so many sessions beside one's own."""
    return 1.0 + CROWDED * others / room


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What a target knows of a worker in reach.

    alone: seconds from a commit until the tree has grown for a while, were there no other session of
        this target; None: not known. last: the same, as it was last measured, however long ago.
    sessions: this target's there. room: how many it takes. avoided: it has failed lately.
    settled: one of the sessions has been there for ``SETTLED`` seconds.
    """

    alone: float | None
    sessions: int
    room: int
    last: float | None = None
    avoided: bool = False
    settled: bool = True

    @property
    def has_room(self) -> bool:
        """For one more."""
        return self.sessions < self.room

    def seconds(self, others: int, alone: float) -> float:
        """What to expect there beside so many other sessions; ``alone`` where nothing is known."""
        return (alone if self.alone is None else self.alone) * slowdown(others, self.room)


def choose(workers: Sequence[Standing]) -> int:
    """Index of the worker, among at least one, where one more request should be drafted for fastest.

    One of which nothing is known is taken for as fast as the fastest, and tried before that.
    """
    alone = min((each.alone for each in workers if each.alone is not None), default=1.0)

    def rank(index: int) -> tuple[bool, float, bool]:
        worker = workers[index]
        return worker.avoided, worker.seconds(worker.sessions, alone), worker.alone is not None

    return min(range(len(workers)), key=rank)


class Mover:
    """Decides which request should move to another worker: at most one at a time, now and then."""

    def __init__(self) -> None:
        self._look_at = 0.0
        self._trial_at = 0.0
        self._slow_since: dict[Hashable, float] = {}
        """Workers than which another is clearly faster, and since when."""

    def is_due(self, now: float) -> bool:
        """Whether it is time for a ``look``."""
        return now >= self._look_at

    def look(self, workers: Mapping[Worker, Standing], now: float) -> tuple[Worker, Worker] | None:
        """From which worker, and to which, a request should move.

        To the one that is fastest for it, if that has been clearly faster for a while. After a move
        everything has to be measured anew, for both are used in another way.
        """
        self._look_at = now + LOOK_EVERY
        gains = {
            each: gain for each in workers if (gain := _best_elsewhere(workers, each)) and gain[0] > CLEARLY
        }
        self._slow_since = {each: self._slow_since.get(each, now) for each in gains}
        ready = [
            (gain, each, to)
            for each, (gain, to) in gains.items()
            if workers[each].settled and now - self._slow_since[each] >= PATIENCE
        ]
        if ready:
            _, slow, fast = max(ready, key=lambda each: each[0])
            self._slow_since.clear()
            return slow, fast
        return self._trial(workers, now)

    def _trial(self, workers: Mapping[Worker, Standing], now: float) -> tuple[Worker, Worker] | None:
        """To an idle worker of which nothing is known, from the slowest: it may be the fastest of all.

        One that has been tried before must have been clearly faster then.
        """
        slow = {
            worker: _here(each)
            for worker, each in workers.items()
            if each.sessions and each.settled and each.alone is not None
        }
        if not slow or now < self._trial_at:
            return None
        slowest = max(slow, key=lambda worker: slow[worker])
        unknown = (
            worker
            for worker, each in workers.items()
            if each.alone is None and each.has_room and not (each.sessions or each.avoided)
            if each.last is None or CLEARLY * each.last < slow[slowest]
        )
        found = next(unknown, None)
        if found is None:
            return None
        self._trial_at = now + TRIAL_PAUSE
        return slowest, found


def _here(worker: Standing) -> float:
    """Seconds for a request that is there, if that is known."""
    return worker.seconds(max(0, worker.sessions - 1), 0.0)


def _best_elsewhere(workers: Mapping[Worker, Standing], here: Worker) -> tuple[float, Worker] | None:
    """How many times faster a request would be drafted for at the best other worker, and which that is."""
    if not workers[here].sessions or workers[here].alone is None:
        return None
    others = {
        worker: each.seconds(each.sessions, 0.0)
        for worker, each in workers.items()
        if worker != here and each.has_room and each.alone is not None and not each.avoided
    }
    if not others:
        return None
    best = min(others, key=lambda worker: others[worker])
    seconds = _here(workers[here])
    return (seconds / max(others[best], 1e-9) if seconds - others[best] > LEAST_GAIN else 1.0), best
