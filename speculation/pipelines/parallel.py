"""``pipeline: parallel``: the living tree. The drafter grows all the time, the target hardly ever waits.

Every target step verifies the best subtree that has arrived, even an empty one, which then is
a step of plain decoding; what grows meanwhile below the nodes in flight survives the commit.
After a miss the bare root is verified at once while the drafter grows from it (PEARL's
pre-verify, Liu et al., "PEARL: Parallel Speculative Decoding with Adaptive Draft Length",
2024), unless growth is on its way that is worth more than the time until it is here: then the
step is held back for it (``linger``). Where steps with the drafter have been slower than steps without, it
rests (``track_record``): this is the automatic, and there is no other.
"""

import numpy as np

from outrider.speculation.living_tree import LivingTree
from outrider.speculation.pipelines.actions import Choice, Linger, RemoteDraft, Verify
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.replication.messages import NO_LIMIT
from outrider.speculation.types import FloatArray

HORIZON = 24
"""Draft steps ahead that are looked at."""


class ParallelPipeline:
    """One request's decisions; it holds no state but the engine's estimates."""

    def __init__(self, shape: TreeShape, costs: CostEstimates) -> None:
        self.shape, self.costs = shape, costs

    def decide(self, draft: RemoteDraft, now: float) -> Linger | Verify:
        """As many of the nodes at hand as raise the expected tokens per second, or more of them soon."""
        draft.steps_after_commit = NO_LIMIT
        if not self.shape.adaptive:
            return Verify(self.shape.num_speculative_tokens)
        costs = self.costs
        if not costs.record_elsewhere.allows(costs.company, with_texts=costs.with_texts):
            if costs.record_elsewhere.has_stopped(costs.company):
                draft.steps_after_commit = 0
            return Verify(0, Choice.OFF)
        budget = self.costs.best_budget(draft.tree, self.shape.num_speculative_tokens)
        nearest = _nearest_growth(draft, now)
        if nearest is None:
            return Verify(budget)
        due, until, every = nearest
        return Linger(budget=budget, due=due, until=until, every=every, gains=self._gains(draft.tree))

    def _gains(self, tree: LivingTree) -> FloatArray:
        """Accepted tokens that so many more draft steps are expected to bring, ``[HORIZON]``.

        A step expands the best leaves. Each is the target's next one with the chance that its path score
        states, and then has a child that is, too, with the chance that children have had so far. What
        a step brings makes the next one's leaves.
        """
        hit = self.costs.hit_probability
        promising = self.costs.trees.trust * self._promising(tree) if len(tree) else 1.0
        gains: FloatArray = min(promising, 1.0) * np.cumsum(hit ** np.arange(1, HORIZON + 1))
        return gains

    def _promising(self, tree: LivingTree) -> float:
        """The sum of the path scores of the leaves that the next draft step expands."""
        live = tree.slots
        is_parent = np.zeros(tree.capacity + 1, np.bool_)
        is_parent[tree.parents[live]] = True
        scores = tree.path_scores[live[~is_parent[live]]]
        scores = scores[scores >= self.shape.min_score]
        return float(-np.sort(-scores)[: self.shape.width].sum())


def _nearest_growth(draft: RemoteDraft, now: float) -> tuple[float, float, float] | None:
    """Of the drafter whose growth should be here first: when, until when it is counted on, how often more."""
    nearest, bare = None, not len(draft.tree)
    for feed in draft.feeds:
        expected, interval = feed.times.expected(now, bare=bare), feed.times.pace.interval
        if expected is not None and interval is not None:
            growth = (*expected, interval)
            nearest = growth if nearest is None else min(nearest, growth)
    return nearest
