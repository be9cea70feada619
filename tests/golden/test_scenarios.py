"""Exact lengths, ends of text and forward counts on TableLM."""

import numpy as np
import pytest
from instruments.checks import (
    ANSWERS,
    GREEDY,
    PROMPT,
    SEEDED,
    check_answers,
    check_closing,
    check_eos,
    check_forward_counts,
    check_identity,
    check_stop_strings,
)
from instruments.drafters import Scripted, junk
from instruments.serving import serve, table_engine
from instruments.table_lm import TableLM

from outrider.speculation.errors import ModelError
from outrider.speculation.sampling_params import SamplingParams


@pytest.mark.parametrize("gamma", [1, 2, 4])
def test_greedy_output_has_the_exact_length_and_tokens(gamma: int) -> None:
    check_identity(GREEDY, gamma)


def test_output_ends_at_the_first_committed_eos() -> None:
    assert check_eos() == {"inside", "bonus", "recovered", "window edge", "rejected sibling"}


@pytest.mark.parametrize("lag", [0, 1])
def test_stop_strings_may_straddle_the_bonus_token(lag: int) -> None:
    check_stop_strings(lag)


@pytest.mark.parametrize("gamma", [1, 2, 3, 4])
def test_forward_counts_of_perfect_and_wrong_drafters(gamma: int) -> None:
    check_forward_counts(gamma)


@pytest.mark.parametrize("name", ANSWERS)
def test_sampling_parameters_mean_the_same_with_any_drafter(name: str) -> None:
    check_answers(name)


def test_text_that_waits_for_whole_characters() -> None:
    check_answers("stop strings", lag=2)


def test_closing_half_way_frees_everything() -> None:
    check_closing()


def test_output_stops_at_the_end_of_the_context() -> None:
    lm = TableLM.random(3, vocab_size=5)
    prompt = [1] * (lm.max_model_len - 5)
    params = SamplingParams(temperature=0.0, max_tokens=50)
    for drafting in (None, Scripted(junk(12, 5, 0))):
        outcome = serve(table_engine(lm, drafting, budget=12), prompt, params)
        assert outcome.token_ids == lm.greedy(prompt, 5)
        assert outcome.finish_reason == "length"


def test_choices_and_unspeculative_requests() -> None:
    lm = TableLM.random(3, vocab_size=5)
    engine = table_engine(lm, Scripted(junk(6, 5, 0)))
    params = SamplingParams(seed=3, max_tokens=10)
    outcomes = [serve(engine, PROMPT, params, choice=choice) for choice in range(3)]
    plain = [serve(engine, PROMPT, params, choice=choice, speculative=False) for choice in range(3)]
    assert [each.token_ids for each in outcomes] == [each.token_ids for each in plain]
    assert len({tuple(each.token_ids) for each in outcomes}) == 3
    assert all(each.stats.num_draft_tokens == 0 for each in plain)


def test_a_junk_node_where_the_target_overflows_harms_nobody() -> None:
    lm = TableLM.cycle([1, 2, 3, 1, 4])
    lm.logits[4] = np.nan
    propose = junk(6, 5, 0)
    assert 4 in propose([1, 2]).tokens
    outcome = serve(
        table_engine(lm, Scripted(propose)), [1, 2], SamplingParams(temperature=0.0, max_tokens=6)
    )
    assert outcome.token_ids == lm.greedy([1, 2], 6)


def test_a_target_that_overflows_on_its_own_path_says_where() -> None:
    lm = TableLM.cycle([1, 2, 3, 1, 4])
    lm.logits[3] = np.nan
    with pytest.raises(ModelError, match="position 3"):
        serve(table_engine(lm, None), [1, 2], SamplingParams(temperature=0.0, max_tokens=6))


def test_seeded_answers_differ_by_seed() -> None:
    """Or the identities above would say little."""
    lm = TableLM.random(3, vocab_size=5)
    outputs = {tuple(lm.sampled(PROMPT, 8, seed)) for seed in range(8)}
    assert len(outputs) == 8
    assert SEEDED.seed == 11
