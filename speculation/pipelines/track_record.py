"""Whether drafting has paid, by the clock: steps with and without it, compared.

Expected gains and measured costs say when drafting should pay. What they leave out (a drafter that
overstates its scores, a cost curve that is off, whatever a busy machine does) shows in the only figure that
counts: tokens per second. Where steps with drafting have brought fewer, it stops, and is tried again after a
pause that doubles each time, so that trying costs ever less.

A drafter in this process takes its time from the target's, so it has to be clearly ahead, and is compared
from the first step on. One elsewhere takes next to none: it is stopped only if steps with it were slower.
"""

from dataclasses import dataclass, field

FIRST_PLAIN = 2
"""Steps without drafting that a batch size begins with, to have something to compare with."""
TRIAL = 8
"""Steps with drafting after which it is judged; half as many in every later trial."""
REFRESH = 128
"""Steps with drafting after which one goes without."""
MARGIN = 1.2
"""By how much drafting has to be faster: where it gains less, its risks and trials cost as much."""
FIRST_PAUSE, LONGEST_PAUSE = 32, 1024
ELSEWHERE_MARGIN = 1.02
ELSEWHERE_FIRST, ELSEWHERE_REFRESH = 64, 512
"""Of a drafter in another process: steps before the first one without it, and between later ones."""
MEMORY = 0.97
"""What is left of an observation's weight after the next one."""


@dataclass(slots=True)
class _Kind:
    """Tokens, and what a plain step's rate would have brought in the same time; the latest weigh most."""

    tokens: float = 0.0
    expected: float = 0.0
    count: int = 0

    @property
    def ratio(self) -> float:
        return self.tokens / self.expected

    def observe(self, tokens: int, expected: float) -> None:
        self.tokens = MEMORY * self.tokens + tokens
        self.expected = MEMORY * self.expected + expected
        self.count += 1


@dataclass(slots=True)
class _BatchSize:
    """waited: steps since drafting was stopped. pause: how many it takes until the next trial."""

    plain: _Kind = field(default_factory=_Kind)
    drafted: _Kind = field(default_factory=_Kind)
    since_plain: int = 0
    waited: int = 0
    pause: int = FIRST_PAUSE

    def is_ahead(self, margin: float) -> bool:
        known = self.drafted.count >= TRIAL
        return known and (not self.plain.count or self.drafted.ratio >= margin * self.plain.ratio)

    def has_stopped(self, margin: float) -> bool:
        return self.drafted.count >= TRIAL and not self.is_ahead(margin)


class TrackRecord:
    """For batch sizes that differ by less than twice, one record each."""

    def __init__(self, *, elsewhere: bool = False) -> None:
        """
        elsewhere: the drafter is in another process.
        """
        self._elsewhere = elsewhere
        self._margin = ELSEWHERE_MARGIN if elsewhere else MARGIN
        self._refresh = ELSEWHERE_REFRESH if elsewhere else REFRESH
        self._sizes: dict[int, _BatchSize] = {}

    def has_stopped(self, batch: int) -> bool:
        """Whether drafting for so many requests at once has not paid."""
        return self._of(batch).has_stopped(self._margin)

    def allows(self, batch: int, *, with_texts: bool) -> bool:
        """Whether a step of so many requests may be preceded by drafting.

        with_texts: the step takes in texts, too, and cannot be judged; then it is no trial.
        """
        size = self._of(batch)
        unknown = size.plain.count < FIRST_PLAIN and not (self._elsewhere and not size.plain.count)
        if unknown or size.since_plain >= self._refresh:
            return False
        return size.is_ahead(self._margin) or (size.drafted.count < TRIAL and not with_texts)

    def observe(
        self, batch: int, *, drafted: bool, tokens: int, seconds: float, plain_seconds: float
    ) -> None:
        """A step of ``batch`` requests brought so many tokens.

        seconds: of the whole step. plain_seconds: what a forward without nodes should take.
        """
        size = self._of(batch)
        kind = size.drafted if drafted else size.plain
        kind.observe(tokens, seconds * batch / plain_seconds)
        if drafted:
            size.since_plain += 1
            if size.is_ahead(self._margin):
                size.pause = FIRST_PAUSE
            return
        size.since_plain = 0
        if size.has_stopped(self._margin):
            size.waited += 1
            if size.waited >= size.pause:
                size.waited, size.pause = 0, min(2 * size.pause, LONGEST_PAUSE)
                size.drafted = _Kind(count=TRIAL // 2)

    def _of(self, batch: int) -> _BatchSize:
        key = batch.bit_length()
        if key not in self._sizes:
            soon = ELSEWHERE_REFRESH - ELSEWHERE_FIRST if self._elsewhere else 0
            self._sizes[key] = new = _BatchSize(since_plain=soon)
            smaller = self._sizes[max((each for each in self._sizes if each < key), default=key)]
            if smaller.has_stopped(self._margin):
                # Nodes are the dearer the more rows a step has anyway: it is tried no sooner.
                new.drafted, new.pause = _Kind(expected=1.0, count=TRIAL), smaller.pause
        return self._sizes[key]
