"""What is verified of the caller's own prediction, where nobody drafts in this process.

It is at hand before every step and costs nothing but its rows, so the target never waits for it.
"""

from typing import Protocol

import numpy as np

from outrider.speculation.living_tree import LivingTree
from outrider.speculation.pipelines.actions import Verify
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.selection import best_budget


class PredictionDraft(Protocol):
    """A prediction's session, as its pipeline sees it."""

    tree: LivingTree


class PredictionPipeline:
    """One request's decisions; it holds no state but the engine's estimates."""

    def __init__(self, shape: TreeShape, costs: CostEstimates) -> None:
        self.shape, self.costs = shape, costs

    def decide(self, draft: PredictionDraft, now: float) -> Verify:  # noqa: ARG002, it never waits
        """As many of the nodes as raise the expected tokens per second; their scores are measured ones."""
        most = self.shape.num_speculative_tokens
        if not self.shape.adaptive:
            return Verify(most)
        scores = -np.sort(-draft.tree.path_scores[draft.tree.slots])
        return Verify(best_budget(scores, self.costs.target_share(most)))
