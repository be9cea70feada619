"""``pipeline: pearl``: a chain, drafted a window ahead while the window before is verified.

The state machine of Liu et al., "PEARL: Parallel Speculative Decoding with Adaptive Draft
Length" (2024), over the living tree. With a window of g tokens:

- ``Phase.PRE_VERIFY``, at the beginning and after every rejection: the target verifies the bare
  root, one plain step, while the drafter drafts the first window. The step's own token decides the
  window's first token in advance: if they are equal, the rest of the window lives on below it.
- ``Phase.POST_VERIFY``: the target verifies the rest of the window, g - 1 nodes below the token that
  is committed already, while the drafter drafts the next window. If all are right, the target's own
  token decides the next window's first one in advance, so that the phase goes on.

A step yields one token before and up to g tokens after, as in the paper. What the paper's code
leaves to chance does not arise here: nothing is returned before it was verified, whether the text ends
by length or by a token that ends it. A window has one author, so that a request keeps one drafter.
"""

import enum

from outrider.speculation.pipelines.actions import RemoteDraft, Verify, Wait
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.pipelines.patience import Lateness, patience
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.replication.pace import LinkPace

LEAST_WINDOW = 2
"""One token at a time would never show how fast the drafter is."""
FIRST_WINDOW = 4
"""Before anything was measured."""


class Phase(enum.Enum):
    """What the next target step verifies."""

    PRE_VERIFY = enum.auto()
    POST_VERIFY = enum.auto()


class PearlPipeline:
    """One request's decisions: ``Wait`` for the window to be drafted, or ``Verify`` it."""

    def __init__(self, shape: TreeShape, costs: CostEstimates) -> None:
        self.shape, self.costs = shape, costs
        self._lateness = Lateness()

    def phase(self, draft: RemoteDraft) -> Phase:
        """Whether any of the window outlived the last commit."""
        return Phase.POST_VERIFY if len(draft.tree) else Phase.PRE_VERIFY

    def decide(self, draft: RemoteDraft, now: float) -> Wait | Verify:
        """The next action; call again whenever something has arrived or the time is up."""
        window = self.window(draft)
        if self.phase(draft) is Phase.PRE_VERIFY:
            return self._verify(draft, window, 0)
        complete = len(draft.tree) >= window - 1
        for feed in () if complete else draft.feeds[:1]:
            if feed.round.ended is None:
                until = self._lateness.wait_until(feed.round.began + _patience(feed.times.pace, window), now)
                if until is not None:
                    return Wait(until)
        return self._verify(draft, window, window - 1, answered=complete)

    def window(self, draft: RemoteDraft) -> int:
        """Tokens that are drafted while the target takes a step, the paper's gamma."""
        most = min(self.shape.num_speculative_tokens, self.shape.depth)
        if not self.shape.adaptive:
            return most
        interval = draft.feeds[0].times.pace.interval if draft.feeds else None
        if interval is None:
            return min(FIRST_WINDOW, most)
        return min(most, max(LEAST_WINDOW, round(float(self.costs.curve(1)[0]) / interval)))

    def _verify(self, draft: RemoteDraft, window: int, budget: int, *, answered: bool = False) -> Verify:
        self._lateness.decided(answered=answered)
        draft.steps_after_commit = window
        return Verify(budget)


def _patience(pace: LinkPace, window: int) -> float:
    if pace.interval is None or pace.answer is None:
        return patience(None)
    return patience(pace.answer + window * pace.interval)
