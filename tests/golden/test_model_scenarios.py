"""Lengths, acceptance, KV and logits of trees, and the draft model's sessions, on a tiny random Llama."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forwards import opened
from instruments.drafters import tokens_to
from instruments.model_checks import (
    CONTEXT,
    VOCAB,
    AuditedRunner,
    check_draft_session,
    check_idle_after_closing,
    check_kv_after_commits,
    check_model_identity,
    check_rows_are_paths,
    decoder,
    draft_engine,
    model_engine,
)

from outrider.actors.drafting import DraftSession
from outrider.actors.target_engine import TargetEngine
from outrider.models.batch import text_rows
from outrider.models.numerics import Numerics
from outrider.speculation.living_tree import LivingTree
from outrider.speculation.request import Request
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.statistics import SpeculationStatistics
from outrider.speculation.tree import Law

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9, "seed": 5},
}
PENALTIES = {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "top_p": 0.95, "min_tokens": 12}


@pytest.fixture(scope="module")
def folder(make_model_folder: Any) -> Path:
    return make_model_folder("llama")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kv_after_every_commit_is_a_fresh_prefill_s(folder: Path, dtype: torch.dtype) -> None:
    check_kv_after_commits(AuditedRunner(decoder(folder, dtype)))


def test_kv_in_fast_numerics_is_nearly_a_fresh_prefill_s(folder: Path) -> None:
    fast = decoder(folder, torch.float32, Numerics.FAST)
    check_kv_after_commits(AuditedRunner(fast, tolerance=1e-4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_node_s_logits_are_those_of_its_path_alone(folder: Path, dtype: torch.dtype) -> None:
    check_rows_are_paths(AuditedRunner(decoder(folder, dtype)))


def test_a_node_s_logits_in_fast_numerics_are_nearly_those(folder: Path) -> None:
    fast = decoder(folder, torch.float32, Numerics.FAST)
    check_rows_are_paths(AuditedRunner(fast, tolerance=1e-4))


@pytest.mark.parametrize("prompt_length", [1, 28, 61])
@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_answers_and_kv_with_every_drafter(
    folder: Path, dtype: torch.dtype, name: str, prompt_length: int
) -> None:
    params = SamplingParams(max_tokens=13, **PARAMETERS[name])
    outcomes = check_model_identity(folder, dtype, params, prompt_length)
    assert len(outcomes["none"].steps) == len(outcomes["wrong"].steps) == 13
    assert len(outcomes["perfect"].steps) == 2
    assert 2 < len(outcomes["partly right"].steps) < 13
    # The twin knows weights and noise: each of its four draft steps is right.
    assert len(outcomes["twin"].steps) == 3
    assert outcomes["twin"].stats.accepted_by_drafter["draft_model"] > 8


@pytest.mark.parametrize("max_tokens", range(1, 10))
def test_any_length_is_exact_on_a_network(folder: Path, max_tokens: int) -> None:
    outcomes = check_model_identity(
        folder, torch.float32, SamplingParams(temperature=0.0, max_tokens=max_tokens), 30
    )
    assert all(len(outcome.token_ids) == max_tokens for outcome in outcomes.values())


@pytest.mark.parametrize("prompt_length", [1, 30, 70])
@pytest.mark.parametrize("extra", [{}, PENALTIES], ids=["bare", "penalties"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_draft_session_is_what_a_fresh_one_would_be(
    folder: Path, name: str, extra: dict[str, Any], prompt_length: int
) -> None:
    runner = AuditedRunner(decoder(folder, torch.float32))
    params = SamplingParams(max_tokens=99, **PARAMETERS[name], **extra)
    assert check_draft_session(runner, params, prompt_length) > 0


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_draft_session_in_other_dtypes(folder: Path, dtype: torch.dtype) -> None:
    runner = AuditedRunner(decoder(folder, dtype))
    assert check_draft_session(runner, SamplingParams(max_tokens=99, **PARAMETERS["seeded"]), 30) > 0


def test_a_text_beyond_the_drafter_is_believed_less_than_another(folder: Path) -> None:
    """Two texts of one engine: in one each guess was right, in the other none. Then both go on alike."""
    runner = AuditedRunner(decoder(folder, torch.float32))
    drafting, stats = draft_engine(runner), SpeculationStatistics()
    params = SamplingParams(max_tokens=99, temperature=0.9, seed=5)
    prompt = np.arange(1, 20)
    told = []
    for lucky in (True, False):
        session = drafting.open(Request(prompt_ids=prompt, params=params), stats)
        text = prompt
        for _ in range(12):
            drafting.grow([session], 1)
            children = session.tree.tokens[session.tree.slots]
            strange = np.setdiff1d(np.arange(1, VOCAB), children)[:1]
            text = np.append(text, chosen := children[:1] if lucky else strange)
            session.commit(chosen)
            session.tree.clear()
        drafting.grow([session], 1)
        fresh = drafting.open(Request(prompt_ids=text, params=params), stats)
        drafting.grow([fresh], 1)
        ours, theirs = (
            dict(zip(tree.tokens[tree.slots].tolist(), tree.path_scores[tree.slots].tolist(), strict=True))
            for tree in (session.tree, fresh.tree)
        )
        assert ours.keys() == theirs.keys()
        told.append(np.array([ours[token] / theirs[token] for token in theirs]))
        session.close()
        fresh.close()
    right, wrong = told
    assert (right >= 1.0).all()
    assert (wrong < 0.9).all()
    assert np.ptp(wrong) < 1e-9


def test_nothing_leaks_from_requests_closed_half_way(folder: Path) -> None:
    check_idle_after_closing(AuditedRunner(decoder(folder, torch.float32)))


def test_output_fills_the_context_of_target_and_of_a_shorter_draft(folder: Path) -> None:
    runner = AuditedRunner(decoder(folder, torch.float32))
    short = decoder(folder, torch.float32, context=CONTEXT - 9)
    draft = AuditedRunner(short)
    prompt = np.arange(1, CONTEXT - 17)
    request = Request(prompt_ids=prompt, params=SamplingParams(seed=1, max_tokens=99, ignore_eos=True))
    plain = tokens_of(model_engine(runner, None), request)
    assert tokens_of(model_engine(runner, draft_engine(draft), depth=6), request) == plain
    assert len(plain) == CONTEXT - len(prompt)


def tokens_of(engine: TargetEngine, request: Request) -> list[int]:
    tokens: list[int] = []
    with engine.start(request) as run:
        while not run.finished:
            tokens += run.step().token_ids
    return tokens


@pytest.mark.parametrize("capacity", [4, 9, 30])
def test_nodes_that_push_out_their_parents_siblings_still_grow(folder: Path, capacity: int) -> None:
    """A step's children may take the slots of nodes of that very step; they must not inherit their state."""
    runner = AuditedRunner(decoder(folder, torch.float32))
    for seed in range(6):
        request = Request(prompt_ids=np.arange(1, 9), params=SamplingParams(seed=seed, max_tokens=9))
        drafting = draft_engine(runner, children=4)
        session = drafting.open(request, SpeculationStatistics())
        tree = session.tree = LivingTree(Law.COUPLED, capacity)
        computed: set[tuple[int, ...]] = set()
        for _ in range(5):
            computed |= {tuple(tokens_to(tree, slot)) for slot in tree.frontier(6).tolist()}
            drafting.grow([session], 6)
            waiting = [slot for slot in tree.slots.tolist() if tuple(tokens_to(tree, slot)) not in computed]
            assert set(waiting) <= set(tree.frontier(capacity).tolist())
        session.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_do_not_depend_on_how_many_are_wanted(folder: Path, dtype: torch.dtype) -> None:
    """The head's rows, too, are whole row classes; a draft wants the last row of many."""
    runner = AuditedRunner(decoder(folder, dtype))
    ids = np.random.default_rng(0).integers(1, VOCAB, 20)
    for count in range(1, 20):
        sequence = opened(runner, ids[:0])
        rows = text_rows(sequence, ids[:count], first_logit_row=0)
        every = runner.forward([rows])
        for first in range(count):
            assert torch.equal(runner.forward([replace(rows, first_logit_row=first)]), every[first:])
        sequence.close()


def test_a_request_that_cannot_start_leaves_nothing_behind(folder: Path) -> None:
    class Broken:
        def open(self, request: Request, stats: SpeculationStatistics) -> DraftSession:  # noqa: ARG002
            raise MemoryError(f"no room for {len(request.prompt_ids)} tokens")

    runner = AuditedRunner(decoder(folder, torch.float32))
    request = Request(prompt_ids=np.arange(1, 9), params=SamplingParams(seed=1))
    with pytest.raises(MemoryError), model_engine(runner, Broken()).start(request) as run:
        run.step()
    runner.cache.check_idle()
