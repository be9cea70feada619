"""When to hold a step back for growth that is on its way, decided for the whole batch.

All requests of a batch wait in one forward. Waiting until some time is worth it while the accepted
tokens that growth should bring until then exceed ``kappa`` times what the batch would get in that
time at its usual rate. A factor is needed because a drafter that is not waited for goes on growing
while the target computes: at kappa = 1 the rule waits far too often. How much that is worth depends on the
link, the drafter and the text, so kappa is learnt from what steps brought.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from outrider.speculation.pipelines.actions import Linger
from outrider.speculation.pipelines.patience import MAX_PATIENCE

NEVER = math.inf
KAPPAS = (2.0, 4.0, 8.0, NEVER)
FIRST_KAPPA = 4.0
"""In simulations with round trips from none to most of a target step, the best or near it."""
FIRST_PAUSE, LONGEST_PAUSE = 48, 768
"""Steps between trials of another kappa; the pause doubles while nothing better is found."""
TRIAL = 16
"""Steps of a trial."""
EVIDENCE = 32
"""Steps with a kappa before it may be adopted."""
MARGIN = 1.02
"""By how much it has to be better."""
MEMORY = 0.99
"""What is left of a step's weight after the next one with the same kappa."""


@dataclass(slots=True)
class _Arm:
    """What steps under one kappa brought: tokens of the target, those that scores promised, seconds."""

    kappa: float
    own: float = 0.0
    promised: float = 0.0
    seconds: float = 0.0
    count: int = 0

    def observe(self, own: int, promised: float, seconds: float) -> None:
        self.own = MEMORY * self.own + own
        self.promised = MEMORY * self.promised + promised
        self.seconds = MEMORY * self.seconds + seconds
        self.count += 1

    def rate(self, worth: float) -> float:
        return (self.own + worth * self.promised) / self.seconds


class _BatchSize:
    """What is known of batches of about one size."""

    def __init__(self, kappas: Sequence[float], first: float) -> None:
        self.arms = [_Arm(kappa) for kappa in kappas]
        self._best = self._tried = self.arms[list(kappas).index(first)]
        self._direction = 1
        self._left, self._pause = FIRST_PAUSE, FIRST_PAUSE
        self._accepted = self._promised = 0.0
        self._tokens = self._seconds = 0.0

    @property
    def kappa(self) -> float:
        return self._tried.kappa

    @property
    def rate(self) -> float:
        """Tokens per second of late."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def observe(self, own: int, promised: float, accepted: int, seconds: float) -> None:
        self._tokens = MEMORY * self._tokens + own + accepted
        self._seconds = MEMORY * self._seconds + seconds
        self._accepted = MEMORY * self._accepted + accepted
        self._promised = MEMORY * self._promised + promised
        self._tried.observe(own, promised, seconds)
        self._left -= 1
        if not self._left:
            self._next()

    def _next(self) -> None:
        """After a pause a neighbour is tried; after a trial the better one is gone on with."""
        if self._tried is self._best:
            self._tried = self._neighbour()
            self._left = TRIAL
            return
        # What a few steps were promised says more of a rule than what they happened to get.
        worth = self._accepted / self._promised if self._promised else 0.0
        better = self._tried.rate(worth) > MARGIN * self._best.rate(worth)
        if better and self._tried.count >= EVIDENCE:
            self._best, self._pause = self._tried, FIRST_PAUSE
        elif not better:
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._direction = -self._direction
        self._tried, self._left = self._best, self._pause

    def _neighbour(self) -> _Arm:
        index = self.arms.index(self._best) + self._direction
        if not 0 <= index < len(self.arms):
            self._direction = -self._direction
            index += 2 * self._direction
        return self.arms[index] if 0 <= index < len(self.arms) else self._best


class LingerRule:
    """Holds steps back, or not, and learns how eagerly. One for an engine, whose requests share steps.

    For batch sizes that differ by less than twice, one record each. kappas: what is tried, ascending;
    a single one is kept.
    """

    def __init__(self, kappas: Sequence[float] = KAPPAS, first: float = FIRST_KAPPA) -> None:
        self._kappas, self._first = kappas, first
        self._sizes: dict[int, _BatchSize] = {}

    def kappa(self, batch: int) -> float:
        """The factor that counts now."""
        return self._of(batch).kappa

    def hold_until(self, offers: Sequence[Linger], batch: int, began: float, now: float) -> float | None:
        """Until when to wait for more growth at the latest; None: verify now.

        offers: of those requests for which growth is on its way. batch: requests that would wait.
        began: when the step was first held back, or might have been.
        """
        size = self._of(batch)
        if not offers or size.kappa == NEVER or not size.rate or now >= began + MAX_PATIENCE:
            return None
        steps = [np.arange(len(offer.gains)) for offer in offers]
        times = np.concatenate(
            [offer.due + offer.every * each for offer, each in zip(offers, steps, strict=True)]
        )
        gains = np.concatenate([np.diff(offer.gains, prepend=0.0) for offer in offers])
        order = np.argsort(times, kind="stable")
        profit = np.cumsum(gains[order]) - size.kappa * size.rate * (times[order] - now)
        if profit.max() <= 0.0:
            return None
        return min(*(offer.until for offer in offers), began + MAX_PATIENCE)

    def observe(self, batch: int, *, promised: float, accepted: int, seconds: float) -> None:
        """A step of ``batch`` requests. promised: path scores of the verified nodes; accepted: of them."""
        self._of(batch).observe(batch, promised, accepted, seconds)

    def _of(self, batch: int) -> _BatchSize:
        key = batch.bit_length()
        if key not in self._sizes:
            self._sizes[key] = _BatchSize(self._kappas, self._first)
        return self._sizes[key]
