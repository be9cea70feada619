"""``pipeline: serial``: draft, then verify, one after the other, as a state machine without I/O.

Between two commits the tree grows while one more draft step is expected to pay; then the best
subtree at hand is verified. Vanilla speculative decoding, with trees and with both lengths
chosen by expected tokens per second (``speculation/selection.py``). Durations come in as numbers,
so the same machine runs on a real or a simulated clock.
"""

from dataclasses import dataclass

import numpy as np

from outrider.speculation.errors import InvalidConfigError
from outrider.speculation.living_tree import LivingTree
from outrider.speculation.selection import best_budget, best_rate, worth_growing
from outrider.speculation.step_cost import StepCostModel
from outrider.speculation.tree import MAX_TREE_DEPTH
from outrider.speculation.types import FloatArray, Verdict

LEARNING_RATE = 0.05
"""Weight of one round in the running estimates."""
FORGETTING = 0.005
"""How fast the estimates of an unused drafter return to where they are tried again."""
FIRST_HIT_PROBABILITY = 0.8
"""Assumed chance that a node's children hold the target's token, before any was judged."""
DEFAULT_SPECULATIVE_TOKENS = 16
MAX_VERIFIED_NODES = 63
"""Nodes that fit one forward, of the target beside the root or of the drafter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeShape:
    """Bounds of the tree of one round.

    num_speculative_tokens: most nodes that one target step verifies.
    width: nodes that one draft step expands, all in one forward.
    children: most children that a node is given.
    depth: most draft steps of one round.
    adaptive: draft and verify only what is expected to pay, possibly nothing; otherwise
        always take ``depth`` draft steps and verify ``num_speculative_tokens`` nodes.

    Raises:
        InvalidConfigError: a bound is not positive or the depth exceeds what attention takes.
    """

    num_speculative_tokens: int = DEFAULT_SPECULATIVE_TOKENS
    width: int = 4
    children: int = 4
    depth: int = 12
    adaptive: bool = True

    def __post_init__(self) -> None:
        for name in ("num_speculative_tokens", "width", "children", "depth"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidConfigError(f"{name} must be a positive integer, not {value!r}")
        if self.depth > MAX_TREE_DEPTH:
            raise InvalidConfigError(f"depth {self.depth} is more than {MAX_TREE_DEPTH}")
        for name in ("num_speculative_tokens", "width"):
            if getattr(self, name) > MAX_VERIFIED_NODES:
                raise InvalidConfigError(f"{name} {getattr(self, name)} is more than {MAX_VERIFIED_NODES}")


@dataclass(frozen=True, slots=True)
class Grow:
    """Expand up to ``width`` frontier nodes in one draft step."""

    width: int


@dataclass(frozen=True, slots=True)
class Verify:
    """Verify the ``budget`` best nodes; none is plain decoding."""

    budget: int


class CostEstimates:
    """What rounds cost and yield, learnt online and shared by all requests of one engine."""

    def __init__(self, step_cost: StepCostModel | None = None) -> None:
        self.step_cost = step_cost or StepCostModel()
        self.draft_seconds: float | None = None
        self.hit_probability = FIRST_HIT_PROBABILITY
        self._curve: FloatArray | None = None

    def curve(self, max_rows: int) -> FloatArray:
        """Seconds of a target step by rows, ``[max_rows]``."""
        if self._curve is None or len(self._curve) < max_rows:
            self._curve = self.step_cost.curve(max_rows)
        return self._curve[:max_rows]

    def observe_target_step(self, rows: int, seconds: float) -> None:
        self.step_cost.observe(rows, seconds)
        self._curve = None

    def observe_draft_step(self, seconds: float) -> None:
        known = seconds if self.draft_seconds is None else self.draft_seconds
        # A stall is not the drafter's cost: one step counts as at most four times the estimate.
        self.draft_seconds = known + LEARNING_RATE * (min(seconds, 4 * known) - known)

    def observe_children(self, hits: int, misses: int) -> None:
        """Nodes on the accepted path whose children held the target's token, or did not."""
        for hit in (1.0,) * hits + (0.0,) * misses:
            self.hit_probability += LEARNING_RATE * (hit - self.hit_probability)

    def forget_a_little(self) -> None:
        """After a step without drafting: what made it unattractive may have changed."""
        self.hit_probability += FORGETTING * (FIRST_HIT_PROBABILITY - self.hit_probability)
        if self.draft_seconds is not None:
            self.draft_seconds *= 1 - FORGETTING


class SerialPipeline:
    """One request's decisions: ``Grow`` some more, or ``Verify`` now."""

    def __init__(self, shape: TreeShape, costs: CostEstimates) -> None:
        self.shape, self.costs = shape, costs
        self._steps = 0
        self._spent = 0.0

    def decide(self, tree: LivingTree) -> Grow | Verify:
        """The next action for ``tree``; call again after every growth and every commit."""
        if not self.shape.adaptive:
            exhausted = self._steps >= self.shape.depth or not len(tree.frontier(1))
            return Verify(self.shape.num_speculative_tokens) if exhausted else Grow(self.shape.width)
        curve = self.costs.curve(self.shape.num_speculative_tokens + 1)
        live = -np.sort(-tree.path_scores[tree.slots])
        if self._steps < self.shape.depth and self._growth_pays(tree, live, curve):
            return Grow(self.shape.width)
        return Verify(best_budget(live, curve, self._spent))

    def observe_growth(self, rows: int, seconds: float) -> None:
        """One draft step computed so many rows in this time."""
        self._steps += 1
        # A step that also takes in the prompt says nothing about the next ones.
        if rows <= self.shape.width:
            self.costs.observe_draft_step(seconds)
            self._spent += seconds

    def observe_verdict(
        self, verdict: Verdict, parents_with_children: int, rows: int, seconds: float
    ) -> None:
        """One target step took this long.

        parents_with_children: nodes of root and accepted path that had children in the tree.
        """
        self.costs.observe_target_step(rows, seconds)
        if not self._steps:
            self.costs.forget_a_little()
        hits = verdict.num_accepted_tokens
        self.costs.observe_children(hits, parents_with_children - hits)
        self._steps, self._spent = 0, 0.0

    def _growth_pays(self, tree: LivingTree, live: FloatArray, curve: FloatArray) -> bool:
        frontier = tree.frontier(self.shape.width)
        if not len(frontier):
            return False
        scores = np.where(frontier < 0, 1.0, tree.path_scores[frontier])
        draft_seconds = self.costs.draft_seconds or 0.0
        per_row = float(curve[-1] - curve[0]) / (len(curve) - 1)
        rate = best_rate(live, curve, self._spent)
        return worth_growing(scores, self.costs.hit_probability, draft_seconds + per_row, rate)
