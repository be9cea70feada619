"""Who takes part in the next step, and with how many rows: policy without tensors.

Requests run in the order of priority (lower first), then of arrival. One that finds no seat or no
memory waits; one that memory runs out for makes the least urgent leave, which begins again later
with the text that it has (preemption by recomputation). What a leaver has computed stays published
for as long as nobody needs its place, so that little is computed twice.
"""

from bisect import insort
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from outrider.speculation.errors import OutriderError
from outrider.speculation.types import IntArray

WORTH_WAITING = 8
"""Tokens that a request begins with another's for; fewer are computed twice rather than late."""


class Candidate(Protocol):
    """A request as the scheduler sees it.

    rank: priority and number of arrival, the most urgent first.
    text: int64 ``[length]``, its committed tokens. num_cached: how many of them have KV; the last
    one never has. num_reusable: how many first ones another's KV would do for, at most all but the last.
    """

    rank: tuple[int, int]

    @property
    def text(self) -> IntArray: ...

    @property
    def num_cached(self) -> int: ...

    @property
    def num_reusable(self) -> int: ...

    def enter(self, like: tuple[Any, int] | None) -> bool:
        """Takes memory for its text, beginning with so many tokens of another's; False: there is none.

        Raises:
            OutriderError: the request cannot be served at all.
        """
        ...

    def leave(self) -> None:
        """Gives its memory back and keeps its text."""
        ...

    def make_room(self) -> bool:
        """Takes memory for the tokens to come; False: there is none."""
        ...


AnyCandidate = TypeVar("AnyCandidate", bound=Candidate)


class Scheduler(Generic[AnyCandidate]):
    """Keeps at most ``max_num_seqs`` requests running; see the module."""

    def __init__(self, max_num_seqs: int) -> None:
        self._max_num_seqs = max_num_seqs
        self.waiting: list[AnyCandidate] = []
        self.running: list[AnyCandidate] = []
        self.num_preemptions = 0

    def add(self, candidate: AnyCandidate) -> None:
        """Queues a request."""
        insort(self.waiting, candidate, key=lambda each: each.rank)

    def remove(self, candidate: AnyCandidate) -> None:
        """Forgets a request, wherever it stands; one that is gone already does no harm."""
        for queue in (self.waiting, self.running):
            if candidate in queue:
                queue.remove(candidate)

    def next_step(self) -> list[tuple[AnyCandidate, OutriderError]]:
        """Settles who is ``running`` in the next step; returns who cannot be served, and why."""
        preempted = self._keep_room()
        # Whoever came now would soon have to leave again.
        return [] if preempted and self.running else self._admit()

    def _keep_room(self) -> bool:
        """Makes room for everyone's next tokens, the most urgent first; whether anyone had to leave."""
        before, index = self.num_preemptions, 0
        while index < len(self.running):
            if self.running[index].make_room():
                index += 1
            else:
                self._preempt(self.running[-1])
        return self.num_preemptions > before

    def _admit(self) -> list[tuple[AnyCandidate, OutriderError]]:
        refused = []
        for candidate in list(self.waiting):
            if not self._may_sit(candidate):
                break
            _, waits = self._likeness(candidate)
            if waits:
                continue
            try:
                entered = self._enter(candidate)
            except OutriderError as error:
                self.waiting.remove(candidate)
                refused.append((candidate, error))
                continue
            if not entered:
                break
        return refused

    def _may_sit(self, candidate: AnyCandidate) -> bool:
        """Whether there is a seat, or somebody less urgent on one."""
        free = len(self.running) < self._max_num_seqs
        return free or self._is_less_urgent(self.running[-1], candidate)

    def _enter(self, candidate: AnyCandidate) -> bool:
        if len(self.running) == self._max_num_seqs:
            self._preempt(self.running[-1])
        while not candidate.enter(self._likeness(candidate)[0]):
            if not self.running or not self._is_less_urgent(self.running[-1], candidate):
                return False
            self._preempt(self.running[-1])
        self.waiting.remove(candidate)
        insort(self.running, candidate, key=lambda each: each.rank)
        return True

    def _likeness(self, candidate: AnyCandidate) -> tuple[tuple[AnyCandidate, int] | None, bool]:
        """Whose cached text a request can begin with, and whether more is about to be cached.

        Requests with one prompt (``n`` choices, a common preamble) so compute it once.
        """
        best, now, later = None, 0, 0
        for other in self.running:
            shared = common_prefix(candidate.text[: candidate.num_reusable], other.text)
            cached = min(shared, other.num_cached)
            if cached > now:
                best, now = (other, cached), cached
            # Beyond its text's end nothing is computed that could be waited for.
            later = max(later, min(shared, len(other.text) - 1))
        return best, later > now and later >= WORTH_WAITING

    def _preempt(self, candidate: AnyCandidate) -> None:
        candidate.leave()
        self.running.remove(candidate)
        self.add(candidate)
        self.num_preemptions += 1

    @staticmethod
    def _is_less_urgent(candidate: AnyCandidate, than: AnyCandidate) -> bool:
        """By priority alone: who came later does not push anyone out."""
        return candidate.rank[0] > than.rank[0]


def common_prefix(left: IntArray, right: IntArray) -> int:
    """How many first tokens two texts share."""
    length = min(len(left), len(right))
    different = np.flatnonzero(left[:length] != right[:length])
    return int(different[0]) if len(different) else length


def share_rows(pending: Sequence[int], max_rows: int) -> list[int]:
    """How many of its pending tokens each request gets cached in the next step, at least one.

    max_rows: of the forward, at least one for each.

    While some have one token pending, and so get their next in this step, the others' prompts take
    at most half of what is left, so that they do not slow them down for as long. Prompts share it
    alike: a short one does not wait for a long one.
    """
    shares = [1] * len(pending)
    left = max_rows - len(pending)
    if 1 in pending:
        left //= 2
    hungry = sorted((index for index, count in enumerate(pending) if count > 1), key=pending.__getitem__)
    for place, index in enumerate(hungry):
        extra = min(pending[index] - 1, left // (len(hungry) - place))
        shares[index] += extra
        left -= extra
    return shares
