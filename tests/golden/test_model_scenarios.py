"""Scenarios 2, 5, 6 and 7 of design §8 and the draft model's sessions, on a tiny random Llama."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from instruments.drafters import Scripted, junk
from instruments.model_checks import (
    CONTEXT,
    MAX_NODES,
    VOCAB,
    AuditedRunner,
    check_draft_session,
    check_kv_after_commits,
    check_model_identity,
    check_rows_are_paths,
    decoder,
    draft_engine,
    model_engine,
)

from outrider.actors.draft_engine import TREE_CAPACITY
from outrider.actors.target_engine import TargetEngine
from outrider.models.numerics import Numerics
from outrider.speculation.request import Request
from outrider.speculation.sampling_params import SamplingParams

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9, "seed": 5},
}
PENALTIES = {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "top_p": 0.95, "min_tokens": 12}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small are fastest on one thread, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    runner = AuditedRunner(decoder(folder, torch.float32), max_nodes=TREE_CAPACITY)
    params = SamplingParams(max_tokens=99, **PARAMETERS[name], **extra)
    assert check_draft_session(runner, params, prompt_length) > 0


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_draft_session_in_other_dtypes(folder: Path, dtype: torch.dtype) -> None:
    runner = AuditedRunner(decoder(folder, dtype), max_nodes=TREE_CAPACITY)
    assert check_draft_session(runner, SamplingParams(max_tokens=99, **PARAMETERS["seeded"]), 30) > 0


def test_nothing_leaks_from_requests_closed_half_way(folder: Path) -> None:
    network = decoder(folder, torch.float32)
    target = AuditedRunner(network)
    draft = AuditedRunner(network, max_nodes=TREE_CAPACITY)
    params = SamplingParams(seed=1, max_tokens=30)
    request = Request(prompt_ids=np.arange(1, 60), params=params)
    for steps in range(4):
        for drafting in (draft_engine(draft), Scripted(junk(12, VOCAB, 0))):
            with model_engine(target, drafting).start(request) as run:
                for _ in range(steps):
                    run.step()
            target.cache.check_idle()
            draft.cache.check_idle()


def test_output_fills_the_context_of_target_and_of_a_shorter_draft(folder: Path) -> None:
    runner = AuditedRunner(decoder(folder, torch.float32))
    short = decoder(folder, torch.float32, context=CONTEXT - 9)
    draft = AuditedRunner(short, max_nodes=TREE_CAPACITY)
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


def test_a_draft_tree_wider_than_its_room(folder: Path) -> None:
    """Frontier nodes may be pushed out by their own step's children."""
    runner = AuditedRunner(decoder(folder, torch.float32), max_nodes=TREE_CAPACITY)
    session = draft_engine(runner, width=60, children=60).open(
        Request(prompt_ids=np.arange(1, 9), params=SamplingParams(seed=1, temperature=1.3, max_tokens=9))
    )
    for _ in range(6):
        session.grow(60)
    assert len(session.tree) <= TREE_CAPACITY
    session.close()
    assert MAX_NODES < TREE_CAPACITY
