"""What steps cost and yield, learnt online by all requests of one engine together."""

import numpy as np

from outrider.speculation.living_tree import LivingTree
from outrider.speculation.pipelines.linger import LingerRule
from outrider.speculation.pipelines.shape import MAX_VERIFIED_NODES
from outrider.speculation.pipelines.track_record import TrackRecord
from outrider.speculation.pipelines.tree_yield import FORGETTING, LEARNING_RATE, TreeYield
from outrider.speculation.selection import best_budget
from outrider.speculation.step_cost import StepCostModel
from outrider.speculation.types import FloatArray, IntArray

SETTLED = 32
REFIT_EVERY = 8
"""The curve is fitted anew after every one of the first target steps, then after so many."""
FIRST_HIT_PROBABILITY = 0.8
"""Assumed chance that a node's children hold the target's token, before any was judged."""


class _LearntCurve:
    """Seconds by rows, fitted anew as steps are observed."""

    def __init__(self, model: StepCostModel) -> None:
        self.model = model
        self.num_observed = 0
        self._curve: FloatArray | None = None

    def upto(self, max_rows: int) -> FloatArray:
        """Seconds of a step with 1, 2, ... ``max_rows`` rows."""
        if self._curve is None or len(self._curve) < max_rows:
            self._curve = self.model.curve(max_rows)
        return self._curve[:max_rows]

    def observe(self, rows: int, seconds: float) -> None:
        self.model.observe(rows, seconds)
        self.num_observed += 1
        # Fitting the curve takes longer than using it, and one step says little once many did.
        if self.num_observed < SETTLED or not self.num_observed % REFIT_EVERY:
            self._curve = None


class CostEstimates:
    """What rounds cost and yield, learnt online and shared by all requests of one engine.

    company: requests that decode in the step to come; each decides as if the others did the same.
    with_texts: the step takes in texts, too.
    max_rows: of one forward.
    """

    def __init__(
        self,
        step_cost: StepCostModel | None = None,
        *,
        max_rows: int = MAX_VERIFIED_NODES + 1,
        linger: LingerRule | None = None,
    ) -> None:
        self.step_cost = step_cost or StepCostModel()
        self.max_rows, self.company, self.with_texts = max_rows, 1, False
        self.draft_seconds: float | None = None
        self.round_trip: float | None = None
        """Seconds of a remote drafter's draft step, and of its round beside them; None before the first."""
        self.hit_probability = FIRST_HIT_PROBABILITY
        self.trees = TreeYield()
        self.record, self.record_elsewhere = TrackRecord(), TrackRecord(elsewhere=True)
        self.linger = linger or LingerRule()
        self._target = _LearntCurve(self.step_cost)
        self._local_draft = _LearntCurve(StepCostModel())
        self._draft_discount = 1.0

    def curve(self, max_rows: int) -> FloatArray:
        """Seconds of a target step by rows, ``[max_rows]``."""
        return self._target.upto(max_rows)

    def target_share(self, most: int) -> FloatArray:
        """Seconds of a target step per request if each verifies 0, 1, ... nodes.

        As many as ``most`` and the forward allow.
        """
        nodes = np.arange(min(most, self.max_rows // self.company - 1) + 1)
        share: FloatArray = self.curve(self.max_rows)[self.company * (1 + nodes) - 1] / self.company
        return share

    def draft_seconds_of(self, rows: IntArray) -> FloatArray:
        """Seconds of draft steps in this process with so many rows, ``[n]``; at most a forward each.

        Zero before the first: whether drafting pays is found out by drafting.
        """
        if not self._local_draft.num_observed:
            return np.zeros(len(rows))
        curve = self._local_draft.upto(self.max_rows)
        seconds: FloatArray = self._draft_discount * curve[np.minimum(rows, self.max_rows) - 1]
        return seconds

    def observe_target_step(self, rows: int, seconds: float) -> None:
        self._target.observe(rows, seconds)

    def observe_local_draft_step(self, rows: int, seconds: float) -> None:
        """A forward of a drafter in this process; one that computes nothing counts as a row."""
        self._local_draft.observe(max(1, rows), seconds)
        self._draft_discount = 1.0

    def observe_draft_step(self, seconds: float) -> None:
        """A remote drafter's."""
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
            self.trees.forgive_a_little(FORGETTING / self.company)

    def best_budget(self, tree: LivingTree, most: int) -> int:
        """How many of a remote drafter's best nodes to verify, its scores taken for what they are worth."""
        live = -np.sort(-tree.path_scores[tree.slots])
        return best_budget(self.trees.trust * live, self.target_share(most))

    def forget_a_little(self) -> None:
        """After a request's step without drafting: what made it unattractive may have changed."""
        share = FORGETTING / self.company
        self.hit_probability += share * (FIRST_HIT_PROBABILITY - self.hit_probability)
        self.trees.forget_a_little(share)
        self._draft_discount *= 1 - share
        if self.draft_seconds is not None:
            self.draft_seconds *= 1 - share
        if self.round_trip is not None:
            self.round_trip *= 1 - share


def _updated(known: float | None, seconds: float) -> float:
    """An estimate after one more observation."""
    # An estimate of zero, from clocks that disagree, would never leave it.
    if not known:
        return seconds
    # A stall is not the drafter's cost: one step counts as at most four times the estimate.
    return known + LEARNING_RATE * (min(seconds, 4 * known) - known)
