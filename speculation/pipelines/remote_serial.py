"""``pipeline: serial`` with the drafter in another process: its growth and verification take turns.

A commit tells the drafter how many steps to take; the target waits for them, then verifies.
How many steps maximises expected tokens per second: k steps and the n best nodes of what they
grow yield ``1 + tokens(k, n)`` in ``T_target(1 + n) + round trip + k * T_draft`` (vanilla
speculative decoding, Leviathan et al., 2023, theorem 3.8, with the trip added and a tree in
place of the chain; ``TreeYield`` learns the tokens). A drafter that does not answer in time is
not waited for again for a while (``patience``), or until it has caught up. Where steps with it have been
slower than steps without, it rests (``track_record``).

Several drafters of one request take their steps at the same time. All of them are waited for that
answer about as soon as the first one does: a second opinion is worth a part of the time of the first,
and a drafter that is far slower, or gone, must not hold up what another has grown.
"""

from collections.abc import Sequence

import numpy as np

from outrider.speculation.living_tree import LivingTree
from outrider.speculation.pipelines.actions import Choice, RemoteDraft, Round, Verify, Wait
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.pipelines.patience import Lateness, patience
from outrider.speculation.pipelines.shape import TreeShape

OTHERS = 1.5
"""Further drafters are waited for until so many times what the first one took."""


class RemoteSerialPipeline:
    """One request's decisions: ``Wait`` for the drafter's steps, or ``Verify`` now."""

    def __init__(self, shape: TreeShape, costs: CostEstimates) -> None:
        self.shape, self.costs = shape, costs
        self._lateness = Lateness()
        self._judged: float | None = None
        """When the round began that was last learnt from."""

    def decide(self, draft: RemoteDraft, now: float) -> Wait | Verify:
        """The next action; call again whenever something has arrived or the time is up."""
        if self.shape.adaptive and not self._drafting_is_allowed():
            return self._rest(draft)
        rounds = [feed.round for feed in draft.feeds]
        awaited = [each for each in _in_step(rounds) if each.ended is None and each.allowed]
        if awaited:
            until = self._lateness.wait_until(self._deadline(rounds, awaited), now)
            if until is not None:
                return Wait(until)
        over = [each for each in rounds if each.ended is not None]
        self._lateness.decided(answered=bool(over))
        # That no steps were allowed needs no answer, which would come after the next commit.
        over += [each for each in rounds if not each.allowed]
        if over:
            # The last one to answer took as long as the target waited.
            self._learn(max(over, key=_duration), draft.tree, sum(each.steps > 0 for each in over))
        draft.steps_after_commit = self._best_steps()
        return Verify(self._budget(draft))

    def _drafting_is_allowed(self) -> bool:
        costs = self.costs
        return costs.record_elsewhere.allows(costs.company, with_texts=costs.with_texts)

    def _rest(self, draft: RemoteDraft) -> Verify:
        """A step of plain decoding: steps with the drafter were slower, or one is due to compare with."""
        stopped = self.costs.record_elsewhere.has_stopped(self.costs.company)
        self._lateness.decided(answered=False)
        steps = self._best_steps()
        if stopped and not steps:
            # Until the next trial is one: else a drafter that got better would never show it.
            self.costs.forget_a_little()
        draft.steps_after_commit = 0 if stopped else steps
        return Verify(0, Choice.OFF)

    def _deadline(self, rounds: Sequence[Round], awaited: Sequence[Round]) -> float:
        """Until when these are waited for; once one drafter has answered, the others get little longer.

        Nothing is no answer: so says a drafter at once whose context is used up.
        """
        answered = [each for each in rounds if each.ended is not None and each.steps]
        first = min(map(_duration, answered), default=None)
        if first is not None:
            return max(each.began for each in awaited) + OTHERS * first
        return max(each.began + self._patience(each.allowed) for each in awaited)

    def _budget(self, draft: RemoteDraft) -> int:
        if not self.shape.adaptive:
            return self.shape.num_speculative_tokens
        return self.costs.best_budget(draft.tree, self.shape.num_speculative_tokens)

    def _learn(self, current: Round, tree: LivingTree, drafters: int) -> None:
        """drafters: who took such a round at the same time, so that steps expand so many times the nodes."""
        if self._judged == current.began:
            return
        self._judged = current.began
        if not current.allowed:
            self.costs.forget_a_little()
        elif current.ended is not None and current.steps and not current.opening:
            self.costs.observe_draft_step(current.seconds / current.steps)
            self.costs.observe_round_trip(max(0.0, current.ended - current.began - current.seconds))
            self.costs.trees.observe_tree(tree, drafters * self.shape.width, current.steps)

    def _patience(self, steps: int) -> float:
        costs = self.costs
        if costs.draft_seconds is None or costs.round_trip is None:
            return patience(None)
        return patience(costs.round_trip + steps * costs.draft_seconds)

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


def _in_step(rounds: Sequence[Round]) -> Sequence[Round]:
    """Rounds of drafters that kept up with the last one; of all, if none did."""
    return [each for each in rounds if not (each.behind or each.opening)] or rounds


def _duration(each: Round) -> float:
    return 0.0 if each.ended is None else each.ended - each.began
