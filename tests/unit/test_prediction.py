"""The caller's prediction as a drafter: it follows, finds its place again, is silent when it is useless."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.speculation.drafters.prediction import (
    FIRST_RATE,
    LEAST_SCORE,
    LOOKAROUND,
    NEAR,
    PredictionDrafter,
)
from outrider.speculation.tree import MAX_TREE_DEPTH

TEXT = np.random.default_rng(0).integers(0, 1000, 300).tolist()
NEW = [1000, 1001, 1002, 1003, 1004]
"""Tokens that the prediction has none of."""


def drafter_after(prediction: Sequence[int], output: Sequence[int]) -> PredictionDrafter:
    drafter = PredictionDrafter(np.array(prediction, np.int64))
    drafter.commit(np.array(output, np.int64))
    return drafter


def next_of(drafter: PredictionDrafter) -> list[int]:
    """Where it believes to be, however much it has been mistaken."""
    drafter.rate = 1.0
    return drafter.propose(4).tokens.tolist()


def count_steps(prediction: Sequence[int], output: Sequence[int], budget: int = 16) -> int:
    """Steps to the end of the output that verify all that is drafted."""
    drafter, text = PredictionDrafter(np.array(prediction, np.int64)), np.array(output, np.int64)
    done = steps = 0
    while done < len(text):
        drafted = drafter.propose(budget).tokens[: len(text) - done]
        same = drafted == text[done : done + len(drafted)]
        count = 1 + (len(same) if same.all() else int(same.argmin()))
        drafter.commit(text[done : done + count])
        done, steps = done + count, steps + 1
    return steps


def test_what_comes_true_takes_a_step_for_every_chain() -> None:
    assert count_steps(TEXT, TEXT) <= 300 / 17 + 2


@pytest.mark.parametrize(
    ("instead", "skipped", "most"),
    [(NEW[:1], 0, 4), ([], 1, 4), ([], 3, 4), (NEW[:1], 1, 4), (NEW[:3], 2, 8), ([], 150, 6)],
    ids=["inserted", "deleted", "three deleted", "replaced", "rewritten", "half deleted"],
)
def test_an_edit_costs_few_steps(instead: list[int], skipped: int, most: int) -> None:
    edited = [*TEXT[:120], *instead, *TEXT[120 + skipped :]]
    assert count_steps(TEXT, edited) <= count_steps(edited, edited) + most


def some_lines(count: int, seed: int) -> list[list[int]]:
    """As of a program: all begin alike, and few tokens make up most of them."""
    rng = np.random.default_rng(seed)
    return [[0, 1, 1, *np.minimum(rng.zipf(1.4, rng.integers(3, 12)), 900).tolist()] for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_lines_like_others_are_got_over(seed: int) -> None:
    """Short matches are everywhere; a place that only ever moved ahead would soon be at the end."""
    lines, more = some_lines(200, seed), some_lines(8, seed + 100)
    rng = np.random.default_rng(seed)
    changed = list(lines)
    for line in more:
        changed.insert(int(rng.integers(len(changed))), line)
    for _ in range(8):
        changed.pop(int(rng.integers(len(changed))))
    prediction, output = list(chain.from_iterable(lines)), list(chain.from_iterable(changed))
    new = sum(map(len, more))
    assert count_steps(prediction, output) <= len(output) / 17 + new + 16 * 6


@pytest.mark.parametrize("skipped", [0, 1, 2, NEAR - 1])
@pytest.mark.parametrize("inserted", range(1 + len(NEW)))
def test_one_token_is_enough_where_it_is_near(skipped: int, inserted: int) -> None:
    output = [*TEXT[:100], *NEW[:inserted], TEXT[100 + skipped]]
    assert next_of(drafter_after(TEXT, output)) == TEXT[101 + skipped : 105 + skipped]


def test_farther_away_two_tokens_are_needed() -> None:
    assert next_of(drafter_after(TEXT, [*TEXT[:100], TEXT[250]])) == TEXT[101:105], "taken for a replaced one"
    assert next_of(drafter_after(TEXT, [*TEXT[:100], *TEXT[250:252]])) == TEXT[252:256]


def test_of_several_places_the_one_that_more_leads_up_to_and_then_the_nearest() -> None:
    text = [*range(10), 50, 51, 52, 20, 60, 51, 52, 21, 70, 52, 22, 80, 52, 23, 24]
    for lead, follower in (([50, 51, 52], 20), ([60, 51, 52], 21), ([70, 52], 22), ([99, 52], 20)):
        assert next_of(drafter_after(text, [*range(5), *lead]))[0] == follower


def test_a_wrong_turn_is_taken_back() -> None:
    """What is inserted stands also far behind; then the text goes on as predicted."""
    output = [*TEXT[:100], *TEXT[250:254]]
    assert next_of(drafter_after(TEXT, output)) == TEXT[254:258]
    assert next_of(drafter_after(TEXT, [*output, *TEXT[100:102]])) == TEXT[102:106]


def test_a_text_may_begin_before_its_prediction() -> None:
    assert next_of(drafter_after(TEXT, [*NEW, TEXT[0]])) == TEXT[1:5]
    assert next_of(drafter_after(TEXT, TEXT[3:4])) == TEXT[4:8]


def test_a_useless_prediction_is_silent_and_one_that_comes_true_speaks_again() -> None:
    drafter = drafter_after(TEXT, [])
    silent_after = 0
    while len(drafter.propose(16)):
        drafter.commit(np.array([1000 + silent_after]))
        silent_after += 1
    assert silent_after <= 16
    drafter.commit(np.array(TEXT[:10]))
    assert drafter.propose(16).tokens[:3].tolist() == TEXT[10:13]


def test_scores_are_the_share_that_came_true() -> None:
    drafted = drafter_after(TEXT, []).propose(100)
    powers = [FIRST_RATE**depth for depth in range(1, len(drafted) + 1)]
    # Powers of an array differ in the last bit from processor to processor.
    assert drafted.scores.tolist() == pytest.approx(powers, rel=1e-12)
    assert drafted.scores[-1] >= LEAST_SCORE > drafted.scores[-1] * FIRST_RATE
    drafter = drafter_after(TEXT, TEXT[:100])
    assert len(drafter.propose(100)) == MAX_TREE_DEPTH
    assert len(drafter.propose(5)) == 5
    assert not len(drafter.propose(0))


def test_behind_its_end_there_is_nothing() -> None:
    assert drafter_after(TEXT, TEXT[:298]).propose(16).tokens.tolist() == TEXT[298:]
    for prediction, output in ((TEXT, TEXT), (TEXT, [*TEXT, *NEW, *TEXT]), ([], TEXT), ([], [])):
        assert not len(drafter_after(prediction, output).propose(16))


def test_work_is_bounded_where_a_token_is_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = drafter_after([7, 8] * 50_000, [])
    looked: list[int] = []
    agreement = drafter._agreement
    monkeypatch.setattr(drafter, "_agreement", lambda ends: looked.append(len(ends)) or agreement(ends))
    drafter.commit(np.array([*[7, 8] * 500, 8, 8, 8, 7, 7, 7]))
    assert looked == [2 * LOOKAROUND] * len(looked)
    assert len(looked) > 3


@settings(derandomize=True, deadline=None, database=None)
@given(st.data())
def test_any_prediction_of_any_text(data: Any) -> None:
    """What is drafted stands so in the prediction, and depends on the output alone, not on its steps."""
    few = st.lists(st.integers(0, 5), max_size=40)
    prediction, output = data.draw(few), data.draw(few)
    whole, stepwise = drafter_after(prediction, output), drafter_after(prediction, [])
    while output:
        count = data.draw(st.integers(1, len(output)))
        stepwise.commit(np.array(output[:count], np.int64))
        output = output[count:]
        drafted = next_of(stepwise)
        assert any(prediction[at : at + len(drafted)] == drafted for at in range(len(prediction) + 1))
        stepwise.rate = 0.5
    assert next_of(stepwise) == next_of(whole)
