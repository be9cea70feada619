"""Tokens with drafters in other processes are those of plain decoding, and were drafted there."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from instruments.processes import accepted, complete

from outrider import LLM, SamplingParams
from outrider.cluster.launcher import LocalWorkers

PROMPTS = ["def fibonacci(n):", "import os\n", "class Node:\n    def __init__(self"]
KINDS = {
    "greedy": SamplingParams(temperature=0, max_tokens=14),
    "top-p": SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=14),
    "seeded": SamplingParams(temperature=1.0, seed=2, max_tokens=14),
    "penalties": SamplingParams(
        temperature=0.5,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        seed=3,
        max_tokens=14,
    ),
    "n": SamplingParams(n=2, temperature=0.8, seed=4, max_tokens=14),
}
Ids = list[list[int]]


def ids(completions: list[Any]) -> Ids:
    return [each.token_ids for each in completions]


@pytest.fixture(scope="module")
def plain() -> Callable[[str, str], Ids]:
    """Token ids of plain decoding, by dtype and kind."""

    @cache
    def target(dtype: str) -> LLM:
        return LLM(speculative_config={}, dtype=dtype)

    @cache
    def generate(dtype: str, kind: str) -> Ids:
        return ids(complete(target(dtype), PROMPTS, KINDS[kind], speculative=False))

    return generate


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pipeline", ["serial", "parallel"])
def test_tokens_are_the_target_s_own(
    dtype: str, pipeline: str, workers: LocalWorkers, plain: Callable[[str, str], Ids]
) -> None:
    config = {
        "workers": ",".join(workers.addresses),
        "pipeline": pipeline,
        # Else a busy machine would find, rightly, that drafting does not pay.
        "tree": {"adaptive": False},
    }
    with LLM(speculative_config=config, dtype=dtype, max_num_seqs=4) as llm:
        done = {kind: complete(llm, PROMPTS, params) for kind, params in KINDS.items()}
    for kind, completions in done.items():
        assert ids(completions) == plain(dtype, kind), kind
    stats = accepted([each for completions in done.values() for each in completions])
    assert set(stats.accepted_by_drafter) == {"draft-0", "draft-1"}
    assert sum(stats.accepted_by_drafter.values()) == stats.num_accepted_tokens > 0
    assert stats.growth_bytes > 12 * stats.growth_nodes > 0


def test_several_workers_draft_for_a_request(workers: LocalWorkers, plain: Callable[[str, str], Ids]) -> None:
    config = {
        "workers": {"addresses": list(workers.addresses), "per_request": 2},
        "tree": {"adaptive": False},
    }
    with LLM(speculative_config=config, max_num_seqs=4) as llm:
        done = {kind: complete(llm, PROMPTS, params) for kind, params in KINDS.items()}
    for kind, completions in done.items():
        assert ids(completions) == plain("auto", kind), kind
    for completions in done.values():
        assert all(each.stats.generations >= 2 for each in completions)
    stats = accepted([each for completions in done.values() for each in completions])
    assert sum(stats.accepted_by_drafter.values()) == stats.num_accepted_tokens > 0


def test_two_targets_share_a_worker(workers: LocalWorkers, plain: Callable[[str, str], Ids]) -> None:
    config = {"workers": workers.addresses[0], "pipeline": "serial", "tree": {"adaptive": False}}
    with LLM(speculative_config=config) as one, LLM(speculative_config=config) as other:
        pairs = [(llm, llm.prepare(PROMPTS[0], KINDS["seeded"])[1][0]) for llm in (one, other)]
        active = [llm.engine.start(request) for llm, request in pairs]
        tokens: Ids = [[], []]
        while not all(run.finished for run in active):
            for made, run in zip(tokens, active, strict=True):
                made += [] if run.finished else run.step().token_ids
        for run in active:
            run.close()
    assert tokens == [plain("auto", "seeded")[0]] * 2
    assert all(run.stats.accepted_by_drafter.get("draft-0") for run in active)
