"""``pipeline: serial``: draft, then verify, one after the other, as a state machine without I/O.

Between two commits the tree grows while one more draft step is expected to pay; then the best
subtree at hand is verified. Vanilla speculative decoding, with trees and with both lengths
chosen by expected tokens per second (``speculation/selection.py``). Durations come in as numbers,
so the same machine runs on a real or a simulated clock.
"""

from typing import Protocol

import numpy as np

from outrider.speculation.living_tree import LivingTree
from outrider.speculation.pipelines.actions import Grow, Verify
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.selection import best_budget, best_rate, worth_growing
from outrider.speculation.types import FloatArray, Verdict


class LocalDraft(Protocol):
    """A drafter in this process, as the pipeline sees it."""

    tree: LivingTree


class SerialPipeline:
    """One request's decisions: ``Grow`` some more, or ``Verify`` now."""

    def __init__(self, shape: TreeShape, costs: CostEstimates) -> None:
        self.shape, self.costs = shape, costs
        self._steps = 0
        self._spent = 0.0

    def decide(self, draft: LocalDraft, now: float) -> Grow | Verify:  # noqa: ARG002
        """The next action; call again after every growth and every commit."""
        tree = draft.tree
        if not self.shape.adaptive:
            exhausted = self._steps >= self.shape.depth or not len(tree.frontier(1))
            return Verify(self.shape.num_speculative_tokens) if exhausted else Grow(self.shape.width)
        curve = self.costs.target_share(self.shape.num_speculative_tokens)
        live = -np.sort(-tree.path_scores[tree.slots])
        if self._steps < self.shape.depth and self._growth_pays(tree, live, curve):
            return Grow(self.shape.width)
        return Verify(best_budget(live, curve, self._spent))

    def observe_growth(self, rows: int, seconds: float) -> None:
        """One draft step computed so many rows for this request, whose share of its time is this."""
        self._steps += 1
        # What took in the text would have been paid for sooner or later: it speaks against no tree.
        if rows <= self.shape.width:
            self._spent += seconds

    def observe_verdict(self, verdict: Verdict, parents_with_children: int, expected: float) -> None:
        """Learns from one verification.

        parents_with_children: nodes of root and accepted path that had children in the tree.
        expected: sum of the tree's path scores.
        """
        if not self._steps:
            self.costs.forget_a_little()
        self.costs.observe_verdict(verdict.num_accepted_tokens, parents_with_children, expected)
        self._steps, self._spent = 0, 0.0

    def _growth_pays(self, tree: LivingTree, live: FloatArray, curve: FloatArray) -> bool:
        frontier = tree.frontier(self.shape.width)
        if not len(frontier) or len(curve) == 1:
            return False
        scores = np.where(frontier < 0, 1.0, tree.path_scores[frontier])
        draft_seconds = self.costs.draft_share(len(frontier))
        per_row = float(curve[-1] - curve[0]) / (len(curve) - 1)
        rate = best_rate(live, curve, self._spent)
        return worth_growing(scores, self.costs.hit_probability, draft_seconds + per_row, rate)
