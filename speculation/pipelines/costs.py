"""What steps cost and yield, learnt online by all requests of one engine together."""

import numpy as np

from outrider.speculation.living_tree import LivingTree
from outrider.speculation.pipelines.tree_yield import FORGETTING, LEARNING_RATE, TreeYield
from outrider.speculation.selection import best_budget
from outrider.speculation.step_cost import StepCostModel
from outrider.speculation.types import FloatArray

SETTLED = 32
REFIT_EVERY = 8
"""The curve is fitted anew after every one of the first target steps, then after so many."""
FIRST_HIT_PROBABILITY = 0.8
"""Assumed chance that a node's children hold the target's token, before any was judged."""


class CostEstimates:
    """What rounds cost and yield, learnt online and shared by all requests of one engine."""

    def __init__(self, step_cost: StepCostModel | None = None) -> None:
        self.step_cost = step_cost or StepCostModel()
        self.draft_seconds: float | None = None
        self.round_trip: float | None = None
        """Seconds of a remote drafter's round beside its draft steps; None before the first."""
        self.hit_probability = FIRST_HIT_PROBABILITY
        self.trees = TreeYield()
        self._curve: FloatArray | None = None
        self._num_observed = 0

    def curve(self, max_rows: int) -> FloatArray:
        """Seconds of a target step by rows, ``[max_rows]``."""
        if self._curve is None or len(self._curve) < max_rows:
            self._curve = self.step_cost.curve(max_rows)
        return self._curve[:max_rows]

    def observe_target_step(self, rows: int, seconds: float) -> None:
        self.step_cost.observe(rows, seconds)
        self._num_observed += 1
        # Fitting the curve takes longer than using it, and one step says little once many did.
        if self._num_observed < SETTLED or not self._num_observed % REFIT_EVERY:
            self._curve = None

    def observe_draft_step(self, seconds: float) -> None:
        self.draft_seconds = _updated(self.draft_seconds, seconds)

    def observe_round_trip(self, seconds: float) -> None:
        """What a remote drafter's round took beside its draft steps."""
        self.round_trip = _updated(self.round_trip, seconds)

    def observe_verdict(self, hits: int, parents_with_children: int, expected: float) -> None:
        """So many tokens of a tree were accepted whose path scores sum up to ``expected``.

        parents_with_children: nodes of root and accepted path that had children in the tree.
        """
        for hit in (1.0,) * hits + (0.0,) * (parents_with_children - hits):
            self.hit_probability += LEARNING_RATE * (hit - self.hit_probability)
        if expected:
            self.trees.observe_verdict(expected, hits)
        else:
            # Else a drafter that lost all credit would never be tried again.
            self.trees.forgive_a_little()

    def best_budget(self, tree: LivingTree, most: int) -> int:
        """How many of a remote drafter's best nodes to verify, its scores taken for what they are worth."""
        live = -np.sort(-tree.path_scores[tree.slots])
        return best_budget(self.trees.trust * live, self.curve(most + 1))

    def forget_a_little(self) -> None:
        """After a step without drafting: what made it unattractive may have changed."""
        self.hit_probability += FORGETTING * (FIRST_HIT_PROBABILITY - self.hit_probability)
        self.trees.forget_a_little()
        if self.draft_seconds is not None:
            self.draft_seconds *= 1 - FORGETTING
        if self.round_trip is not None:
            self.round_trip *= 1 - FORGETTING


def _updated(known: float | None, seconds: float) -> float:
    """An estimate after one more observation."""
    # An estimate of zero, from clocks that disagree, would never leave it.
    if not known:
        return seconds
    # A stall is not the drafter's cost: one step counts as at most four times the estimate.
    return known + LEARNING_RATE * (min(seconds, 4 * known) - known)
