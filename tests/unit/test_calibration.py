"""Calibration against simulated drafters whose error is known."""

import numpy as np
import pytest

from outrider.speculation.calibration import (
    CREDIT_MEMORY,
    CREDIT_PRIOR,
    NUM_RANKS,
    RankCalibration,
    TextCredit,
)
from outrider.speculation.types import FloatArray


def simulate(calibration: RankCalibration, offers: int, seed: int, sharpness: float = 0.5) -> None:
    """A drafter that claims ``s`` where the truth is ``truth(rank, s)``."""
    rng = np.random.default_rng(seed)
    for _ in range(offers // 8):
        ranks = np.arange(8)
        scores = rng.uniform(0.02, 0.99, 8)
        calibration.observe(ranks, scores, rng.random(8) < truth(ranks, scores, sharpness))


def truth(ranks: object, scores: FloatArray, sharpness: float) -> FloatArray:
    return np.asarray(scores * sharpness / (1 + np.asarray(ranks)), np.float64)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_corrected_scores_converge_to_the_truth(rank: int) -> None:
    calibration = RankCalibration(memory=3000)
    simulate(calibration, 160_000, seed=0)
    scores = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    ranks = np.full(5, rank)
    assert calibration.correct(ranks, scores) == pytest.approx(truth(ranks, scores, 0.5), rel=0.15, abs=0.02)
    assert not np.allclose(scores, truth(ranks, scores, 0.5), rtol=0.15, atol=0.02)


def test_before_any_observation_scores_stay() -> None:
    scores = np.array([1e-6, 0.2, 0.999, 1.0])
    assert RankCalibration().correct(np.arange(4), scores) == pytest.approx(scores)


def test_the_prior_weighs_what_it_says() -> None:
    calibration = RankCalibration(prior_weight=10.0, memory=1e9)
    calibration.observe(np.zeros(30, int), np.full(30, 0.4), np.arange(30) < 3)
    assert calibration.correct([0], [0.4]) == pytest.approx([(10 * 0.4 + 3) / (10 + 30)])
    assert calibration.correct([1], [0.4]) == pytest.approx([0.4]), "another rank has learnt nothing"
    assert calibration.correct([0], [0.9]) == pytest.approx([0.9]), "nor has another bucket"


def test_the_prior_keeps_its_weight_against_a_short_memory() -> None:
    calibration = RankCalibration(prior_weight=10.0, memory=10.0)
    for _ in range(1000):
        calibration.observe([0], [0.4], [False])
    offered = 1 / (1 - np.exp(-1 / 10))
    assert calibration.correct([0], [0.4]) == pytest.approx([0.4 * 10 / (10 + offered)])


def test_a_drafter_that_changes_is_forgotten() -> None:
    calibration = RankCalibration(memory=300)
    simulate(calibration, 40_000, seed=1, sharpness=0.1)
    simulate(calibration, 40_000, seed=2, sharpness=0.9)
    assert calibration.correct([0], [0.6]) == pytest.approx([0.54], rel=0.15)


@pytest.mark.parametrize("accepted", [True, False])
def test_corrected_scores_stay_probabilities_and_keep_their_order(accepted: bool) -> None:
    calibration = RankCalibration(memory=1e6)
    scores = np.array([0.0, 1e-300, 1e-9, 0.31, 0.33, 0.35, 0.985, 1.0])
    for _ in range(500):
        calibration.observe(np.zeros(8, int), scores, np.full(8, accepted))
    corrected = calibration.correct(np.zeros(8, int), scores)
    assert (corrected > 0).all()
    assert (corrected <= 1).all()
    assert (np.diff(corrected[3:6]) >= 0).all()
    assert (corrected[4] > 0.9) if accepted else (corrected[4] < 0.01)


def test_late_ranks_share_their_counts() -> None:
    calibration = RankCalibration()
    calibration.observe([NUM_RANKS + 5] * 100, [0.5] * 100, [False] * 100)
    late = calibration.correct([NUM_RANKS - 1, NUM_RANKS, NUM_RANKS - 2], [0.5] * 3)
    assert late[0] == late[1] < 0.1
    assert late[2] == 0.5


def test_nothing_to_observe_changes_nothing() -> None:
    calibration = RankCalibration()
    calibration.observe([], [], [])
    assert calibration.correct([], []).shape == (0,)
    assert calibration.correct([0], [0.5]).tolist() == [0.5]


def test_malformed_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        RankCalibration(prior_weight=0)
    with pytest.raises(ValueError, match="ranks for"):
        RankCalibration().correct([0, 1], [0.5])
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        RankCalibration().correct([0], [float("nan")])
    with pytest.raises(ValueError, match="must not be negative"):
        RankCalibration().correct([-1], [0.5])
    with pytest.raises(ValueError, match="outcomes for"):
        RankCalibration().observe([0], [0.5], [True, False])


def test_a_text_s_credit_is_what_came_of_what_was_promised() -> None:
    credit = TextCredit()
    assert credit.factor == 1.0
    credit.observe(1, hits=0, expected=0.9)
    assert credit.factor == pytest.approx(CREDIT_PRIOR / (CREDIT_PRIOR + 0.9))
    credit.observe(3, hits=2, expected=2.5)
    old = CREDIT_MEMORY**3
    assert credit.factor == pytest.approx((CREDIT_PRIOR + 2) / (CREDIT_PRIOR + 0.9 * old + 2.5))


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8, 1.0])
def test_a_text_s_credit_follows_the_text(rate: float) -> None:
    rng, credit = np.random.default_rng(0), TextCredit()
    for _ in range(400):
        credit.observe(1, hits=1, expected=0.8)
    assert credit.factor > 1.0
    for _ in range(400):
        credit.observe(1, hits=int(rng.random() < rate), expected=0.8)
    settled = 0.8 / (1 - CREDIT_MEMORY)
    target = (CREDIT_PRIOR + settled * rate / 0.8) / (CREDIT_PRIOR + settled)
    assert credit.factor == pytest.approx(target, rel=0.12)
