"""``pipeline: serial`` in one process: draft, then verify, one after the other, for a whole batch at once.

Between two commits trees grow while one more draft step is expected to pay; then the best subtrees
at hand are verified. Vanilla speculative decoding, with trees and with both lengths chosen by
expected tokens per second (``speculation/selection.py``). Everybody waits while some draft, so the question
is one for the batch: a draft step of some trees is worth what it is expected to bring them, less what all
requests would have got in its time. Durations come in as numbers, so the same rule runs on any clock.
"""

from collections.abc import Collection, Sequence

import numpy as np

from outrider.speculation.living_tree import LivingTree
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.selection import best_together, share_budget
from outrider.speculation.types import FloatArray


def may_pay(shape: TreeShape, costs: CostEstimates, company: int, *, with_texts: bool) -> bool:
    """Whether to look at drafting before a step at all: not where it has not paid (``track_record``).

    company: requests in the step whose drafts take time. Those that are still taken in are among them:
    they wait for drafts, too. with_texts: there are such.
    """
    return not shape.adaptive or costs.record.allows(company, with_texts=with_texts)


class SerialRound:
    """One step's drafting.

    trees: of every request that gets a token in the step, None where nobody drafts.
    text_rows: rows of the step that are no nodes, at least one for each request.
    given: indices of trees that are complete and cost nothing to draft: they are verified in any step.
    drafts: whether the others are grown, see ``may_pay``.
    """

    def __init__(
        self,
        shape: TreeShape,
        costs: CostEstimates,
        trees: Sequence[LivingTree | None],
        text_rows: int,
        given: Collection[int] = (),
        *,
        drafts: bool = True,
    ) -> None:
        self._shape, self._costs, self._trees = shape, costs, trees
        self._other_rows = text_rows - len(trees)
        self._steps = [0] * len(trees)
        self._spent = 0.0
        self._drafts = drafts
        self._live = [
            _live_scores(tree) if tree is not None and (self._drafts or index in given) else _NOTHING
            for index, tree in enumerate(trees)
        ]
        self._offers = [(0.0, 0) if tree is None or not self._drafts else self._offer(tree) for tree in trees]
        """Expected gain of expanding each tree once more, and the rows that takes; none where it is over."""

    def growers(self) -> list[int]:
        """Which trees to expand now, in one draft step; none: verify."""
        if not self._drafts:
            return []
        able = [index for index, (_, rows) in enumerate(self._offers) if rows]
        if not able or not self._shape.adaptive:
            return able
        gains = np.array([self._offers[index][0] for index in able])
        rows = np.array([self._offers[index][1] for index in able])
        # Those with the most gain for a row first; how many of them is the question.
        order = np.argsort(-gains / rows, kind="stable")
        profit = np.cumsum(gains[order]) - self._price(np.cumsum(rows[order]))
        best = int(profit.argmax())
        return [able[index] for index in order[: best + 1]] if profit[best] > 0 else []

    def observe_growth(self, growers: Sequence[int], rows: Sequence[int], seconds: float) -> None:
        """A draft step expanded these trees, with so many rows each, in this time."""
        width, total = self._shape.width, max(1, sum(rows))
        self._costs.observe_local_draft_step(total, seconds)
        for index, count in zip(growers, rows, strict=True):
            tree = self._trees[index]
            assert tree is not None
            # What took in the text would have been paid for sooner or later: it speaks against no tree.
            self._spent += seconds * count / total if count <= width else 0.0
            self._steps[index] += 1
            # A text that is taken in piece by piece holds up nobody.
            over = self._steps[index] >= self._shape.depth or tree.is_bare
            self._offers[index] = (0.0, 0) if over else self._offer(tree)
            self._live[index] = _live_scores(tree)

    def budgets(self) -> list[int]:
        """Most nodes of each request to verify."""
        if not any(self._steps):
            self._costs.forget_a_little()
        most = self._shape.num_speculative_tokens
        if not self._shape.adaptive and len(self._trees) == 1:
            return [min(most, self._costs.max_rows - 1 - self._other_rows)]
        if not any(map(len, self._live)):
            return [0] * len(self._trees)
        scores = [each[:most] for each in self._live]
        return share_budget(scores, self._spent + self._costs.curve(self._costs.max_rows), self._other_rows)

    def _offer(self, tree: LivingTree) -> tuple[float, int]:
        """What expanding the best nodes is expected to bring, and the rows it takes."""
        if tree.is_bare:
            return self._costs.hit_probability, 1
        frontier = tree.frontier(self._shape.width)
        scores = np.where(frontier < 0, 1.0, tree.path_scores[frontier])
        return float(scores.sum()) * self._costs.hit_probability, len(frontier)

    def _price(self, rows: np.ndarray) -> FloatArray:
        """Tokens that the batch would get in the time of a draft step with these rows, by number of trees."""
        curve = self._costs.curve(self._costs.max_rows)
        base = self._other_rows + len(self._trees)
        if base >= len(curve):
            return np.full(len(rows), np.inf)
        rate = best_together(np.concatenate(self._live), self._spent + curve[base - 1 :], len(self._trees))
        per_node = float(curve[-1] - curve[base - 1]) / (len(curve) - base)
        price: FloatArray = rate * (
            self._costs.draft_seconds_of(rows) + per_node * np.arange(1, len(rows) + 1)
        )
        return price


_NOTHING: FloatArray = np.zeros(0)


def _live_scores(tree: LivingTree) -> FloatArray:
    """Path scores of a tree's nodes, best first."""
    if not len(tree):
        return _NOTHING
    scores: FloatArray = -np.sort(-tree.path_scores[tree.slots])
    return scores
