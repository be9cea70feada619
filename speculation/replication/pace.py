"""When growth comes in: how soon after a commit, and how often. All on the target's clock.

A commit and the growth that crosses it on the wire do not wait for each other, so what is said of a commit
is told from the numbers in the growth, not from the order of events.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from operator import attrgetter

from outrider.speculation.replication.messages import Growth

LEARNING_RATE = 0.05
"""Weight of one observation, once there were many."""
SURPRISE = 4.0
"""A stall is not the link's pace: an observation counts as at most so many times the estimate."""
STEPS = 4
"""Draft steps that a link is judged by: about as many as a tree is deep when it is verified."""
SLACK = 0.5
"""Growth that is later than expected by more than this share of its time is not counted on."""


class _Average:
    """A running mean that forgets; None before the first observation."""

    def __init__(self) -> None:
        self.value: float | None = None
        self._count = 0

    def observe(self, seconds: float) -> None:
        self._count += 1
        if not self.value:
            self.value = seconds
            return
        weight = max(LEARNING_RATE, 1 / self._count)
        self.value += weight * (min(seconds, SURPRISE * self.value) - self.value)


class LinkPace:
    """How fast the drafter at the end of a link is, learnt by all requests on it."""

    def __init__(self) -> None:
        self._answer, self._interval, self._measured_load = _Average(), _Average(), _Average()
        self.load = 1.0
        """How many times slower the drafter is expected to be at present than for one request alone."""

    @property
    def alone(self) -> float | None:
        """Seconds from a commit to ``STEPS`` draft steps' growth if there were but one request."""
        answer, interval, load = self.answer, self.interval, self._measured_load.value
        if answer is None or interval is None or load is None:
            return None
        return (answer + (STEPS - 1) * interval) / load

    @property
    def answer(self) -> float | None:
        """Seconds from sending a commit to the arrival of the first growth that knows of it."""
        return self._answer.value

    @property
    def interval(self) -> float | None:
        """Seconds between the draft steps whose growth arrives."""
        return self._interval.value

    def observe_answer(self, seconds: float) -> None:
        """A commit was answered."""
        self._answer.observe(max(0.0, seconds))
        self._measured_load.observe(self.load)

    def observe_interval(self, seconds: float) -> None:
        """So long after a draft step, the next one had been taken."""
        self._interval.observe(seconds)


class GrowthTimes:
    """When growth of one generation arrived, and when more of it should."""

    def __init__(self, pace: LinkPace, now: float) -> None:
        """
        now: when the generation was opened, which counts as its first commit.
        """
        self.pace = pace
        self._commit, self._sent, self._seen = 0, now, -1
        self._unanswered: tuple[int, float] | None = None
        """The oldest commit that no growth is known to have seen, and when it was sent."""
        self._latest: list[Growth] = []
        self._arrived: float | None = None
        """When the latest growth did, while the drafter goes on."""

    def committed(self, sequence: int, now: float) -> None:
        """A commit was sent."""
        self._commit, self._sent = sequence, now
        if self._unanswered is None:
            self._unanswered = sequence, now

    def arrived(self, messages: Sequence[Growth], clock_offset: float) -> None:
        """Growth came in, at least one message. clock_offset: from the drafter's clock to ours."""
        if self._latest and messages[-1].first_id < self._latest[0].first_id:
            return  # It has been here before.
        self._note_answer(messages, clock_offset)
        self._note_intervals(messages)
        latest = messages[-1]
        self._arrived = None if latest.final else latest.sent_at + clock_offset
        self._seen = max(self._seen, latest.seen_commit)
        self._latest = [latest]

    def expected(self, now: float, *, bare: bool) -> tuple[float, float] | None:
        """When the growth of the next draft step should arrive, and until when it is counted on.

        bare: the tree has no nodes, so growth from before the last commit is of no use.
        None: nobody knows, none will come, or it is overdue.
        """
        pace = self.pace
        if pace.answer is None or pace.interval is None:
            return None
        if self._seen < self._commit and (bare or self._arrived is None):
            due, took = self._sent + pace.answer, pace.answer
        elif self._arrived is not None:
            due, took = self._arrived + pace.interval, pace.interval
        else:
            return None
        latest = due + SLACK * took
        return (max(due, now), latest) if now < latest else None

    def _note_answer(self, messages: Sequence[Growth], clock_offset: float) -> None:
        if self._unanswered is None or messages[-1].seen_commit < self._unanswered[0]:
            return
        sequence, sent = self._unanswered
        first = bisect_left(messages, sequence, key=attrgetter("seen_commit"))
        # That there is nothing to draft is said at once.
        if messages[first].draft_steps:
            self.pace.observe_answer(messages[first].sent_at + clock_offset - sent)
        self._unanswered = None

    def _note_intervals(self, messages: Sequence[Growth]) -> None:
        # The last ones are enough, and however many there are they take no longer.
        last = messages[-3:] if len(messages) > 2 else [*self._latest, *messages]
        for earlier, later in pairwise(last):
            follows = later.first_id == earlier.first_id + len(earlier.tokens)
            seconds = later.sent_at - earlier.sent_at
            if follows and later.draft_steps and earlier.seen_commit == later.seen_commit and seconds > 0:
                self.pace.observe_interval(seconds / later.draft_steps)
