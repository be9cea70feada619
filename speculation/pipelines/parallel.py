"""``pipeline: parallel``: the living tree. The drafter grows all the time, the target never waits.

Every target step verifies the best subtree that has arrived, even an empty one, which then is
a step of plain decoding; what grows meanwhile below the nodes in flight survives the commit.
After a miss the bare root is verified at once while the drafter grows from it (PEARL's
pre-verify, Liu et al., "PEARL: Parallel Speculative Decoding with Adaptive Draft Length",
2024); otherwise drafting goes on during verification (its post-verify).
"""

from outrider.speculation.pipelines.actions import RemoteDraft, Verify
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.pipelines.shape import TreeShape


class ParallelPipeline:
    """One request's decisions; it holds no state but the engine's estimates."""

    def __init__(self, shape: TreeShape, costs: CostEstimates) -> None:
        self.shape, self.costs = shape, costs

    def decide(self, draft: RemoteDraft, now: float) -> Verify:  # noqa: ARG002, it never waits
        """As many of the nodes at hand as raise the expected tokens per second."""
        if not self.shape.adaptive:
            return Verify(self.shape.num_speculative_tokens)
        return Verify(self.costs.best_budget(draft.tree, self.shape.num_speculative_tokens))
