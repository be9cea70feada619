"""Budgets, the rule for waiting and the cost curve, against brute force and known curves."""

import itertools

import numpy as np
import pytest

from outrider.speculation.selection import best_budget, best_together, rates
from outrider.speculation.step_cost import DEFAULT_SECONDS, DEFAULT_SLOPE, MEMORY, StepCostModel, isotonic


def test_best_budget_equals_trying_every_number() -> None:
    rng = np.random.default_rng(0)
    chosen = set()
    for _ in range(300):
        nodes, rows = rng.integers(0, 12), rng.integers(1, 10)
        scores = np.sort(rng.random(nodes) ** 2)[::-1]
        seconds = np.cumsum(rng.random(rows) * 0.4) + 0.6
        draft = float(rng.choice([0.0, 0.5]))
        tried = [
            (1 + sum(scores[:n].tolist())) / (draft + seconds[n]) for n in range(min(nodes, rows - 1) + 1)
        ]
        budget = best_budget(scores, seconds, draft)
        assert tried[budget] == pytest.approx(max(tried))
        assert best_together(scores[::-1], draft + seconds, 1) == pytest.approx(max(tried))
        chosen.add(budget)
    assert len(chosen) > 4


def test_budgets_of_extreme_costs() -> None:
    scores = [0.9, 0.5, 0.1]
    assert best_budget(scores, [1.0, 1.0, 1.0, 1.0]) == 3, "free rows are all used"
    assert best_budget(scores, [1.0, 2.0, 3.0, 4.0]) == 0, "rows as dear as tokens are not worth it"
    assert best_budget(scores, [1.0, 1.0]) == 1, "the curve bounds the rows"
    assert best_budget([], [1.0, 1.0]) == 0
    assert best_budget([0.0], [1.0, 1.0]) == 0, "the smaller budget on ties"


def test_time_already_spent_drafting_makes_larger_trees_pay() -> None:
    scores, seconds = [0.5, 0.25], [1.0, 1.4, 1.8]
    assert best_budget(scores, seconds, 0.0) == 1
    assert best_budget(scores, seconds, 2.0) == 2


@pytest.mark.parametrize(
    ("scores", "seconds", "draft", "message"),
    [
        ([0.5], [], 0.0, "at least one"),
        ([0.5], [1.0, 0.0], 0.0, "positive"),
        ([0.5], [1.0, float("nan")], 0.0, "positive"),
        ([0.5], [1.0, 1.0], -1.0, "draft_seconds is -1.0"),
        ([0.1, 0.5], [1.0, 1.0, 1.0], 0.0, "descending"),
    ],
)
def test_malformed_rates_are_refused(
    scores: list[float], seconds: list[float], draft: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rates(scores, seconds, draft)


def test_without_observations_the_curve_is_the_default_or_the_prior() -> None:
    assert StepCostModel().curve(3) == pytest.approx(DEFAULT_SECONDS * (1 + DEFAULT_SLOPE * np.arange(3)))
    prior = StepCostModel([1.0, 1.0, 3.0])
    assert prior.curve(2).tolist() == [1.0, 1.0]
    assert prior.curve(5).tolist() == [1.0, 1.0, 3.0, 4.0, 5.0], "extended by its mean slope"
    assert StepCostModel([2.0]).curve(2).tolist() == [2.0, 2.0 + 2.0 * DEFAULT_SLOPE]


def test_one_observation_scales_the_assumed_shape() -> None:
    model = StepCostModel()
    model.observe(5, 0.8)
    shape = 1 + DEFAULT_SLOPE * np.arange(9)
    assert model.curve(9) == pytest.approx(0.8 * shape / shape[4])
    assert model.curve(3) == pytest.approx(0.8 * shape[:3] / shape[4])
    stepped = StepCostModel([1.0, 1.0, 2.0, 2.0])
    stepped.observe(2, 3.0)
    assert stepped.curve(4) == pytest.approx([3.0, 3.0, 6.0, 6.0])


def test_rounding_does_not_make_the_curve_decrease() -> None:
    """A flat prior scaled by seconds / prior rounds below the observation it is scaled to."""
    for seconds in np.random.default_rng(0).uniform(0.003, 0.012, 200):
        model = StepCostModel([0.0041] * 8)
        model.observe(3, seconds)
        assert (np.diff(model.curve(8)) >= 0).all()


def test_the_curve_converges_to_a_noisy_line_in_spite_of_stalls() -> None:
    rng = np.random.default_rng(1)
    model = StepCostModel()
    for _ in range(1500):
        rows = int(rng.choice([1, 2, 4, 7, 8, 16, 24]))
        seconds = 0.02 + 0.001 * rows
        stall = 100.0 if rng.random() < 0.01 else 1.0
        model.observe(rows, seconds * stall * float(np.exp(rng.normal(0, 0.05))))
    curve = model.curve(48)
    assert (np.diff(curve) >= 0).all()
    assert curve == pytest.approx(0.02 + 0.001 * np.arange(1, 49), rel=0.15)


def test_a_warm_up_outlier_is_soon_forgotten_and_drift_is_followed() -> None:
    model = StepCostModel()
    for seconds in [10.0] + [0.05] * 60:
        model.observe(4, seconds)
    assert model.curve(4)[3] == pytest.approx(0.05, rel=0.1)
    for _ in range(120):
        model.observe(4, 0.5)
    assert model.curve(4)[3] == pytest.approx(0.5, rel=0.05)


def test_a_stall_counts_as_four_times_the_estimate() -> None:
    model = StepCostModel()
    for seconds in [1.0] * 30 + [1000.0]:
        model.observe(1, seconds)
    assert model.curve(1) == pytest.approx([4 ** (1 / MEMORY)])


def test_two_row_counts_give_the_slope_beyond_them() -> None:
    model = StepCostModel()
    model.observe(2, 1.0)
    model.observe(4, 2.0)
    assert model.curve(8)[1:] == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0])
    with_prior = StepCostModel([1.0, 1.0, 1.0, 1.0, 3.0])
    with_prior.observe(2, 1.0)
    with_prior.observe(4, 2.0)
    assert with_prior.curve(5) == pytest.approx([1.0, 1.0, 1.5, 2.0, 6.0]), "the prior's shape beyond"


def test_isotonic_is_the_best_monotone_fit() -> None:
    grid = [0.0, 1.0, 1.5, 2.0, 2.5, 3.0]
    for values in itertools.product((1.0, 2.0, 3.0), repeat=3):
        for weights in ([1.0, 1.0, 1.0], [1.0, 3.0, 1.0]):
            fit = isotonic(list(values), weights)
            assert (np.diff(fit) >= 0).all()
            error = np.dot(weights, (fit - values) ** 2)
            for other in itertools.combinations_with_replacement(grid, 3):
                assert error <= np.dot(weights, (np.array(other) - values) ** 2) + 1e-12


@pytest.mark.parametrize("prior", [[], [0.0, 1.0], [2.0, 1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_malformed_priors_are_refused(prior: list[float]) -> None:
    with pytest.raises(ValueError, match="prior curve"):
        StepCostModel(prior)


@pytest.mark.parametrize(("rows", "seconds"), [(0, 1.0), (1, 0.0), (1, float("nan")), (1, float("inf"))])
def test_malformed_observations_are_refused(rows: int, seconds: float) -> None:
    with pytest.raises(ValueError, match=f"a step of {rows} rows"):
        StepCostModel().observe(rows, seconds)
    with pytest.raises(ValueError, match="not 0"):
        StepCostModel().curve(0)
