"""Many requests on a tiny network with little memory: each gets what it would get alone.

Scenario 9: mixed lengths, temperatures, seeds and penalties; joins, leaves, cancellations, preemption,
common prompts, and one request whose drafter is always wrong.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from instruments.model_checks import CONTEXT, VOCAB, decoder, draft_engine, model_engine

from outrider.actors.model_runner import ModelRunner
from outrider.actors.request_run import RequestRun
from outrider.actors.running_batch import RunningBatch, Ticket
from outrider.kernels.native import library
from outrider.models.batch import Rows
from outrider.models.block_pool import blocks_for
from outrider.speculation.request import Request
from outrider.speculation.sampling_params import SamplingParams

LEAST_BLOCKS = blocks_for(CONTEXT)
"""Of a cache that holds the longest text and nothing else."""


class CountingRunner(ModelRunner):
    """Notes the rows of each forward, part by part."""

    def __init__(self, network: Any, *, num_blocks: int) -> None:
        super().__init__(network, num_blocks=num_blocks)
        self.forwards: list[list[int]] = []

    def forward(self, parts: Sequence[Rows]) -> torch.Tensor:
        self.forwards.append([len(part.tokens) for part in parts])
        return super().forward(parts)


@pytest.fixture(scope="module")
def folder(make_model_folder: Any) -> Path:
    made: Path = make_model_folder("llama", max_position_embeddings=CONTEXT)
    return made


def some_request(number: int) -> Request:
    """One of few prompts, cut anywhere, with parameters of all kinds."""
    rng = np.random.default_rng(number)
    prompt = np.random.default_rng(1000 + number % 4).integers(1, VOCAB, 120)[: int(rng.integers(1, 120))]
    params = SamplingParams(
        temperature=float(rng.choice([0.0, 0.7, 1.0])),
        seed=number,
        max_tokens=int(rng.integers(1, 50)),
        top_p=float(rng.choice([1.0, 0.9])),
        repetition_penalty=float(rng.choice([1.0, 1.3])),
        ignore_eos=bool(rng.integers(0, 2)),
    )
    return Request(
        prompt_ids=prompt, params=params, priority=int(rng.integers(-1, 2)), speculative=number % 5 > 0
    )


def run(batch: RunningBatch, until: int = 10_000) -> None:
    for _ in range(until):
        batch.step()
        if not batch.num_running and not batch.num_waiting:
            return
    raise AssertionError(f"{batch.num_waiting} requests wait for ever")


def tokens_of(ticket: Ticket) -> list[int]:
    assert ticket.completion is not None, ticket.error
    return ticket.completion.token_ids


def running(batch: RunningBatch) -> list[RequestRun]:
    return [ticket.run for ticket in batch._scheduler.running if ticket.run is not None]


def blocks_of(batch: RunningBatch) -> list[list[int]]:
    return [each._sequence.blocks for each in running(batch)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafted"])
def test_each_equals_its_solo_run(folder: Path, dtype: torch.dtype, drafts: bool) -> None:
    check_equal_to_solo_runs(folder, dtype, drafts=drafts)


@pytest.mark.skipif(
    library.layers(torch.empty(0)) is None, reason="the native module is not built or is switched off"
)
def test_each_equals_its_solo_run_behind_a_sliding_window(make_model_folder: Any) -> None:
    """Blocks that the window leaves behind go to others, and come back with who has to leave."""
    folder = make_model_folder("mistral", max_position_embeddings=CONTEXT, sliding_window=40)
    assert check_equal_to_solo_runs(folder, torch.bfloat16, drafts=True) > 100


def check_equal_to_solo_runs(folder: Path, dtype: torch.dtype, *, drafts: bool) -> int:
    """Returns in how many steps some running text had given back blocks behind its window."""
    network = decoder(folder, dtype)
    alone = model_engine(ModelRunner(network, num_blocks=4 * LEAST_BLOCKS), None)

    @cache
    def solo(number: int) -> list[int]:
        batch = RunningBatch(alone, 1)
        ticket = batch.submit(replace(some_request(number), speculative=False))
        run(batch)
        return tokens_of(ticket)

    drafting = None
    if drafts:
        draft = ModelRunner(decoder(folder, torch.float32), num_blocks=4 * (LEAST_BLOCKS + 8))
        drafting = draft_engine(draft)
    runner = ModelRunner(network, num_blocks=LEAST_BLOCKS + 6)
    batch = RunningBatch(model_engine(runner, drafting, depth=3), 8)
    rng = np.random.default_rng(0)
    tickets: dict[int, Ticket] = {}
    cancelled, slid = set(), 0
    for _ in range(10_000):
        if len(tickets) < 40 and rng.random() < 0.6:
            tickets[len(tickets)] = batch.submit(some_request(len(tickets)))
        if rng.random() < 0.02 and tickets:
            victim = int(rng.integers(len(tickets)))
            if not tickets[victim].finished:
                batch.cancel(tickets[victim])
                cancelled.add(victim)
        batch.step()
        runner.cache.check(blocks_of(batch))
        slid += any(len(each._sequence.blocks) < blocks_for(each.num_cached) for each in running(batch))
        if len(tickets) == 40 and not batch.num_running and not batch.num_waiting:
            break
    else:
        raise AssertionError("requests wait for ever")
    runner.cache.check_idle()
    assert batch.num_preemptions > 3
    assert cancelled
    for number, ticket in tickets.items():
        if number not in cancelled:
            assert tokens_of(ticket) == solo(number), f"request {number}"
    done = [each.completion.stats for each in tickets.values() if each.completion is not None]
    assert sum(each.cached_tokens for each in done) > 100, "texts were found again"
    if drafts:
        draft.cache.check_idle()
        assert sum(each.num_accepted_tokens for each in done) > 100
    return slid


def test_a_step_is_one_forward_of_all_rows(folder: Path) -> None:
    runner = CountingRunner(decoder(folder, torch.float32), num_blocks=6 * LEAST_BLOCKS)
    draft = ModelRunner(decoder(folder, torch.float32), num_blocks=4 * (LEAST_BLOCKS + 8))
    engine = model_engine(runner, draft_engine(draft), depth=3)
    batch = RunningBatch(engine, 4)
    for number in (1, 2, 3, 4):
        batch.submit(replace(some_request(number), priority=0))
    while True:
        steps, forwards = engine.steps, len(runner.forwards)
        brought = batch.step()
        if not brought and not batch.num_running:
            break
        assert engine.steps == steps + 1
        assert len(runner.forwards) == forwards + 1
        assert sum(runner.forwards[-1]) <= 64
    prefilling = [rows for rows in runner.forwards if max(rows) > 17]
    assert any(len(rows) > 1 for rows in prefilling), "pieces of prompts and trees share a forward"


def test_choices_share_one_prefill(folder: Path) -> None:
    runner = CountingRunner(decoder(folder, torch.float32), num_blocks=6 * LEAST_BLOCKS)
    batch = RunningBatch(model_engine(runner, None), 4)
    prompt = np.random.default_rng(5).integers(1, VOCAB, 100)
    params = SamplingParams(seed=3, max_tokens=5, ignore_eos=True, n=4)
    tickets = [batch.submit(Request(prompt_ids=prompt, params=params, choice=choice)) for choice in range(4)]
    run(batch)
    assert sum(map(sum, runner.forwards)) == 99 + 4 * 5, "99 tokens once, then a row per token of a choice"
    assert len({tuple(tokens_of(ticket)) for ticket in tickets}) == 4
    for choice, ticket in enumerate(tickets):
        again = batch.submit(Request(prompt_ids=prompt, params=params, choice=choice))
        run(batch)
        assert tokens_of(again) == tokens_of(ticket)
    runner.cache.check_idle()


def test_a_repeated_prompt_is_not_computed_again(folder: Path) -> None:
    runner = CountingRunner(decoder(folder, torch.float32), num_blocks=6 * LEAST_BLOCKS)
    batch = RunningBatch(model_engine(runner, None), 4)
    prompt = np.random.default_rng(5).integers(1, VOCAB, 150)
    rows = []
    for seed in (1, 2):
        before = sum(map(sum, runner.forwards))
        params = SamplingParams(seed=seed, max_tokens=1)
        ticket = batch.submit(Request(prompt_ids=prompt, params=params))
        run(batch)
        rows.append(sum(map(sum, runner.forwards)) - before)
    assert rows == [150, 150 - 128]
    assert ticket.completion is not None
    assert ticket.completion.stats.cached_tokens == 128


def test_a_text_that_never_fits_ends_with_an_error(folder: Path) -> None:
    runner = ModelRunner(decoder(folder, torch.float32), num_blocks=2)
    batch = RunningBatch(model_engine(runner, None), 4)
    params = SamplingParams(seed=1, max_tokens=100, ignore_eos=True)
    long, short = (batch.submit(Request(prompt_ids=np.arange(1, size), params=params)) for size in (100, 9))
    run(batch)
    assert "does not fit the KV cache" in str(long.error)
    assert "does not fit the KV cache" in str(short.error), "it grew beyond the cache"
    assert len(short.token_ids) == 64 - 8 + 1
    runner.cache.check_idle()


def test_memory_is_never_exceeded_by_trees(folder: Path) -> None:
    """Where there is no room for nodes they are left out, and nobody leaves for them."""
    network = decoder(folder, torch.float32)
    draft = ModelRunner(network, num_blocks=2 * (LEAST_BLOCKS + 8))
    runner = ModelRunner(network, num_blocks=4)
    batch = RunningBatch(model_engine(runner, draft_engine(draft), depth=4), 2)
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    tickets = [
        batch.submit(Request(prompt_ids=np.arange(start, start + 43), params=params)) for start in (1, 100)
    ]
    run(batch)
    assert batch.num_preemptions == 0
    assert [len(tokens_of(each)) for each in tickets] == [20, 20]
