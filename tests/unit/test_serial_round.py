"""Who drafts once more before a step, decided for a batch as a whole."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from outrider.speculation.living_tree import LivingTree
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.pipelines.serial import SerialRound, may_pay
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.pipelines.track_record import FIRST_PLAIN, TRIAL
from outrider.speculation.step_cost import StepCostModel
from outrider.speculation.tree import ROOT, Law

FLAT = 0.05 * (1 + 0.005 * np.arange(64))
"""A target for which rows cost next to nothing."""
STEEP = 0.01 * np.arange(1, 65)
"""One for which every row costs as much as the first."""


def tree_of(scores: Sequence[float] = (), *, expanded: bool = True) -> LivingTree:
    tree = LivingTree(Law.COUPLED)
    if len(scores):
        tree.add([ROOT] * len(scores), np.arange(len(scores)), scores)
    if expanded:
        tree.mark_expanded(ROOT)
    return tree


def costs_of(curve: np.ndarray, draft: float | None = None, max_rows: int = 64) -> CostEstimates:
    """Of an engine for which drafting has paid so far."""
    costs = CostEstimates(StepCostModel(curve), max_rows=max_rows)
    for batch in (1, 2, 4, 8, 16, 32, 64):
        for drafted in [False] * FIRST_PLAIN + [True] * TRIAL:
            tokens = 9 if drafted else 1
            costs.record.observe(batch, drafted=drafted, tokens=tokens, seconds=1.0, plain_seconds=1.0)
    if draft is not None:
        for rows in (1, 64):
            costs.observe_local_draft_step(rows, draft)
    return costs


def round_of(costs: CostEstimates, trees: Sequence[LivingTree | None], **shape: int) -> SerialRound:
    return SerialRound(TreeShape(**shape), costs, trees, len(trees))


def test_what_is_not_known_is_tried() -> None:
    assert round_of(costs_of(FLAT), [tree_of(expanded=False), None]).growers() == [0]


def test_cheap_drafting_pays_and_dear_drafting_does_not() -> None:
    bare = [tree_of(expanded=False)]
    assert round_of(costs_of(FLAT, draft=0.005), bare).growers() == [0]
    assert round_of(costs_of(FLAT, draft=0.06), bare).growers() == []
    assert round_of(costs_of(STEEP, draft=0.0001), bare).growers() == [], "its nodes cost as much as tokens"


def test_many_pay_for_a_step_that_one_cannot_pay_for() -> None:
    """A draft step takes as long for all as for one, and meanwhile all wait."""
    costs = costs_of(FLAT, draft=0.03)
    assert round_of(costs, [tree_of(expanded=False)] * 8).growers() == list(range(8))
    one_of_eight = [tree_of(expanded=False), *[tree_of()] * 7]
    assert round_of(costs, one_of_eight).growers() == []


def test_those_with_little_to_gain_are_left_out() -> None:
    costs = costs_of(FLAT)
    costs.observe_local_draft_step(1, 0.001)
    costs.observe_local_draft_step(64, 0.2)
    trees = [tree_of([0.9]), tree_of([0.001]), tree_of([0.8])]
    assert round_of(costs, trees).growers() == [0, 2]


@pytest.mark.parametrize("seed", range(40))
def test_no_other_choice_would_be_better(seed: int) -> None:
    """Brute force over all subsets, where each tree offers one row."""
    rng = np.random.default_rng(seed)
    scores = rng.random(4) ** 2
    curve = np.cumsum(rng.random(64) * 0.004) + 0.03
    draft = np.cumsum(rng.random(64) * 0.006)
    costs = costs_of(curve)
    for rows in range(1, 65):
        costs.observe_local_draft_step(rows, float(draft[rows - 1]))
    growers = round_of(costs, [tree_of([score]) for score in scores], width=1).growers()

    base = 4
    rate = max((base + sum(sorted(scores)[::-1][:n])) / curve[base - 1 + n] for n in range(5))
    per_node = (curve[-1] - curve[base - 1]) / (64 - base)

    def profit(chosen: Sequence[int]) -> float:
        gain = sum(scores[index] for index in chosen) * costs.hit_probability
        return gain - rate * (draft[len(chosen) - 1] + per_node * len(chosen)) if chosen else 0.0

    subsets = [each for count in range(5) for each in itertools.combinations(range(4), count)]
    assert profit(sorted(growers)) == pytest.approx(max(map(profit, subsets)))


def test_a_full_forward_leaves_no_room_for_drafting() -> None:
    costs = costs_of(FLAT, draft=0.001)
    full = SerialRound(TreeShape(), costs, [tree_of(expanded=False)], 64)
    assert full.growers() == []
    assert full.budgets() == [0]


def test_a_round_ends_with_its_depth_or_with_a_text_taken_in_piece_by_piece() -> None:
    growing, slow = tree_of(expanded=False), tree_of(expanded=False)
    this_round = round_of(costs_of(FLAT, draft=0.001), [growing, slow], depth=3)
    grown = 0
    while growers := this_round.growers():
        if 0 in growers:
            frontier = growing.frontier(1)
            growing.mark_expanded(frontier)
            growing.add(frontier, [grown], [0.9])
            grown += 1
        this_round.observe_growth(growers, [1 if index == 0 else 64 for index in growers], 0.001)
    assert grown == 3
    assert slow.is_bare
    assert this_round.budgets() == [3, 0]


def test_what_drafting_took_makes_larger_trees_pay() -> None:
    curve = np.array([1.0, 1.4, 1.8])
    budgets = []
    for seconds in (1e-9, 2.0):
        tree = tree_of(expanded=False)
        costs = costs_of(curve, max_rows=3)
        this_round = SerialRound(TreeShape(), costs, [tree], 1)
        tree.mark_expanded(ROOT)
        tree.add([ROOT, ROOT], [1, 2], [0.5, 0.25])
        this_round.observe_growth([0], [1], seconds)
        budgets += this_round.budgets()
    assert budgets == [1, 2]


def test_drafting_that_does_not_pay_is_tried_again_at_any_batch_size() -> None:
    for batch in (1, 16):
        costs = costs_of(FLAT, draft=0.2 * batch)
        waited = 0
        while not (growers := round_of(costs, [tree_of(expanded=False)] * batch).growers()):
            round_of(costs, [tree_of(expanded=False)] * batch).budgets()
            waited += 1
        assert growers
        assert 50 < waited < 2000, f"batch {batch}"


def test_without_adaptation_every_tree_grows_to_its_depth() -> None:
    costs = costs_of(STEEP, draft=9.0)
    trees = [tree_of(expanded=False), None, tree_of([0.5])]
    this_round = SerialRound(TreeShape(adaptive=False, depth=1), costs, trees, 3)
    assert this_round.growers() == [0, 2]
    this_round.observe_growth([0, 2], [1, 1], 9.0)
    assert this_round.growers() == []


def test_a_complete_tree_is_verified_also_where_drafting_has_not_paid() -> None:
    complete = tree_of([0.9, 0.8])
    complete.mark_expanded([0, 1])
    costs = CostEstimates(StepCostModel(FLAT))
    trees = [tree_of([0.9]), complete, None]
    this_round = SerialRound(TreeShape(), costs, trees, 3, given=[1], drafts=False)
    assert this_round.growers() == []
    assert this_round.budgets() == [0, 2, 0]
    assert SerialRound(TreeShape(), costs, trees, 3, drafts=False).budgets() == [0, 0, 0]


def test_whether_drafting_may_pay_is_asked_for_all_that_will_wait_for_it() -> None:
    costs, shape = costs_of(FLAT), TreeShape()
    for batch in (4, 8, 16, 32):  # from here on it pays no longer
        for _ in range(500):
            costs.record.observe(batch, drafted=True, tokens=1, seconds=9.0, plain_seconds=1.0)
    assert may_pay(shape, costs, 1, with_texts=False)
    assert may_pay(shape, costs, 3, with_texts=True)
    assert not may_pay(shape, costs, 4, with_texts=True)
    assert may_pay(TreeShape(adaptive=False), costs, 4, with_texts=True)


def test_complete_trees_and_others_share_the_rows() -> None:
    complete = tree_of([0.9, 0.8])
    complete.mark_expanded([0, 1])
    this_round = SerialRound(TreeShape(), costs_of(FLAT), [tree_of([0.9]), complete], 2, given=[1])
    assert 1 not in this_round.growers()
    assert this_round.budgets() == [1, 2]
