"""``pipeline: serial`` with the drafter in another process: its growth and verification take turns.

A commit tells the drafter how many steps to take; the target waits for them, then verifies.
How many steps maximises expected tokens per second: k steps and the n best nodes of what they
grow yield ``1 + tokens(k, n)`` in ``T_target(1 + n) + round trip + k * T_draft`` (vanilla
speculative decoding, Leviathan et al., 2023, theorem 3.8, with the trip added and a tree in
place of the chain; ``TreeYield`` learns the tokens). A drafter that does not answer in time is
not waited for again until it has caught up.
"""

import numpy as np

from outrider.speculation.living_tree import LivingTree
from outrider.speculation.pipelines.actions import RemoteDraft, Round, Verify, Wait
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.pipelines.shape import TreeShape

MAX_PATIENCE = 0.2
"""Seconds that a target waits for a drafter at most; a stall must stay under a quarter second."""
PATIENCE = 4.0
"""Expected durations of a round after which a drafter counts as late."""
LEAST_PATIENCE = 0.02


class RemoteSerialPipeline:
    """One request's decisions: ``Wait`` for the drafter's steps, or ``Verify`` now."""

    def __init__(self, shape: TreeShape, costs: CostEstimates) -> None:
        self.shape, self.costs = shape, costs
        self._late = False
        self._asked: float | None = None
        """When the decision at hand was first asked for."""
        self._judged: float | None = None
        """When the round began that was last learnt from."""

    def decide(self, draft: RemoteDraft, now: float) -> Wait | Verify:
        """The next action; call again whenever something has arrived or the time is up."""
        current = draft.round
        if self._asked is None:
            self._asked = now
        if current.ended is None and current.allowed and draft.reachable and not self._late:
            # A worker that takes over meanwhile begins a new round, but no new wait.
            until = min(current.began + self._patience(current.allowed), self._asked + MAX_PATIENCE)
            if now < until:
                return Wait(until)
            self._late = True
        self._asked = None
        if current.ended is not None:
            self._late = False
        # That no steps were allowed needs no answer, which would come after the next commit.
        if current.ended is not None or not current.allowed:
            self._learn(current, draft.tree)
        draft.steps_after_commit = self._best_steps()
        return Verify(self._budget(draft))

    def _budget(self, draft: RemoteDraft) -> int:
        if not self.shape.adaptive:
            return self.shape.num_speculative_tokens
        return self.costs.best_budget(draft.tree, self.shape.num_speculative_tokens)

    def _learn(self, current: Round, tree: LivingTree) -> None:
        if self._judged == current.began:
            return
        self._judged = current.began
        if not current.allowed:
            self.costs.forget_a_little()
        elif current.ended is not None and current.steps and not current.opening:
            self.costs.observe_draft_step(current.seconds / current.steps)
            self.costs.observe_round_trip(max(0.0, current.ended - current.began - current.seconds))
            self.costs.trees.observe_tree(tree, self.shape.width, current.steps)

    def _patience(self, steps: int) -> float:
        costs = self.costs
        if costs.draft_seconds is None or costs.round_trip is None:
            return MAX_PATIENCE
        expected = costs.round_trip + steps * costs.draft_seconds
        return min(MAX_PATIENCE, max(LEAST_PATIENCE, PATIENCE * expected))

    def _best_steps(self) -> int:
        """Draft steps of the next round, from 0 to the shape's depth."""
        depth, costs = self.shape.depth, self.costs
        if not self.shape.adaptive:
            return depth
        share = costs.target_share(self.shape.num_speculative_tokens)
        nodes = len(share) - 1
        steps = np.arange(depth + 1)[:, None]
        draft = np.where(steps > 0, (costs.round_trip or 0.0) + steps * (costs.draft_seconds or 0.0), 0.0)
        # Requests wait at the same time, so each bears its part of the wait, as of the step.
        rates = (1.0 + costs.trees.tokens(depth, nodes)) / (share + draft / costs.company)
        return int(rates.argmax()) // (nodes + 1)
