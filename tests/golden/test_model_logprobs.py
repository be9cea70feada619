"""Log-probabilities of a network's tokens are those of one plain forward over the text, bit for bit.

Whatever else happens: drafts, other requests, chunks, preemption, prefix caching, ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forwards import chunked_logits, make_runner
from instruments.model_checks import CONTEXT, VOCAB, decoder, draft_engine, model_engine
from instruments.tensor_ranks import RankServers
from transformers import AutoModelForCausalLM

from outrider.actors.model_runner import ModelRunner
from outrider.actors.running_batch import RunningBatch, Ticket
from outrider.models.block_pool import blocks_for
from outrider.models.numerics import MAX_ROWS
from outrider.speculation.logprobs import look_up
from outrider.speculation.request import Completion, Request, TokenLogprobs
from outrider.speculation.sampling_params import SamplingParams

LEAST_BLOCKS = blocks_for(CONTEXT)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(make_model_folder: Any) -> Path:
    made: Path = make_model_folder("llama", max_position_embeddings=CONTEXT)
    return made


def a_request(number: int, **params: Any) -> Request:
    """One of few prompts, cut anywhere; most ask for something."""
    rng = np.random.default_rng(number)
    prompt = np.random.default_rng(2000 + number % 3).integers(1, VOCAB, 120)[: int(rng.integers(1, 120))]
    chosen: dict[str, Any] = {
        "temperature": float(rng.choice([0.0, 0.7, 1.0])),
        "seed": number,
        "max_tokens": int(rng.integers(1, 40)),
        "top_k": int(rng.choice([0, 5])),
        "repetition_penalty": float(rng.choice([1.0, 1.3])),
        "logit_bias": {5: 20.0} if number % 7 == 0 else None,
        "logprobs": [None, 0, 3, 20][number % 4],
        "prompt_logprobs": [None, None, 0, 5][number % 4],
        **params,
    }
    return Request(
        prompt_ids=prompt,
        params=SamplingParams(**chosen),
        priority=int(rng.integers(-1, 2)),
        speculative=number % 5 > 0,
    )


def finish(batch: RunningBatch) -> None:
    while batch.num_running or batch.num_waiting:
        batch.step()


def completion_of(ticket: Ticket) -> Completion:
    assert ticket.completion is not None, ticket.error
    return ticket.completion


def all_logits(runner: ModelRunner, text: Sequence[int]) -> torch.Tensor:
    """Logits ``[length, vocab]`` of a text by itself, from a runner that does nothing else."""
    sizes = [min(MAX_ROWS, len(text) - start) for start in range(0, len(text), MAX_ROWS)]
    logits, sequence = chunked_logits(runner, np.array(text, np.int64), sizes)
    sequence.close()
    return logits


def entries(logits: torch.Tensor, text: Sequence[int], count: int) -> list[TokenLogprobs]:
    """By definition, of all tokens but the first."""
    values = logits[:-1, :VOCAB].float()
    logprobs = torch.log_softmax(values, dim=1)
    found = []
    for row, token in enumerate(text[1:]):
        order = np.lexsort((np.arange(VOCAB), -values[row].numpy())).tolist()
        best = order[:count]
        rank = 1 + order.index(token)
        found.append(
            TokenLogprobs(token, logprobs[row, token].item(), rank, best, logprobs[row, best].tolist())
        )
    return found


def require_plain(reference: ModelRunner, request: Request, done: Completion) -> None:
    """A request was told what a plain forward over its text says, and no more than it asked for."""
    prompt, params = request.prompt_ids.tolist(), request.params
    text = [*prompt, *done.token_ids]
    logits = all_logits(reference, text)
    if params.logprobs is None:
        assert done.logprobs is None
    else:
        assert done.logprobs == entries(logits, text, params.logprobs)[len(prompt) - 1 :]
    if params.prompt_logprobs is None:
        assert done.prompt_logprobs is None
    else:
        expected = entries(logits, text, params.prompt_logprobs)[: len(prompt) - 1]
        assert done.prompt_logprobs == [None, *expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafted"])
def test_each_is_told_what_a_plain_forward_says(folder: Path, dtype: torch.dtype, drafts: bool) -> None:
    network = decoder(folder, dtype)
    drafting = None
    if drafts:
        # The target itself, so that much is accepted.
        drafting = draft_engine(ModelRunner(network, num_blocks=8 * (LEAST_BLOCKS + 8)))
    runner = ModelRunner(network, num_blocks=LEAST_BLOCKS + 6)
    batch = RunningBatch(model_engine(runner, drafting, depth=3), 6)
    rng = np.random.default_rng(0)
    tickets: list[Ticket] = []
    while len(tickets) < 24 or batch.num_running or batch.num_waiting:
        if len(tickets) < 24 and rng.random() < 0.6:
            tickets.append(batch.submit(a_request(len(tickets))))
        batch.step()
    runner.cache.check_idle()
    assert batch.num_preemptions > 3
    reference = ModelRunner(network, num_blocks=2 * LEAST_BLOCKS)
    for ticket in tickets:
        require_plain(reference, ticket.request, completion_of(ticket))
    asking = [each for each in tickets if each.request.params.prompt_logprobs is not None]
    assert sum(completion_of(each).stats.cached_tokens for each in tickets) > 0
    assert sum(completion_of(each).stats.preemptions for each in asking) > 0
    if drafts:
        assert sum(completion_of(each).stats.num_accepted_tokens for each in tickets) > 100


def test_a_step_s_entries_are_those_of_its_tokens(folder: Path) -> None:
    network = decoder(folder, torch.float32)
    drafting = draft_engine(ModelRunner(network, num_blocks=4 * (LEAST_BLOCKS + 8)))
    batch = RunningBatch(model_engine(ModelRunner(network, num_blocks=LEAST_BLOCKS), drafting, depth=3), 1)
    ticket = batch.submit(a_request(3, max_tokens=30, ignore_eos=True))
    outputs = []
    while not ticket.finished:
        outputs += [output for _, output in batch.step() if output is not None]
    done = completion_of(ticket)
    for output in outputs:
        assert [each.token_id for each in output.logprobs or ()] == output.token_ids
    assert [each for output in outputs for each in output.logprobs or ()] == done.logprobs
    assert [each.prompt_logprobs for each in outputs] == [done.prompt_logprobs] + [None] * (len(outputs) - 1)
    assert len(outputs) < 30


def test_a_prompt_that_others_have_cached_is_computed_again(folder: Path) -> None:
    """And can be found by those after it."""
    network = decoder(folder, torch.float32)
    runner, reference = (ModelRunner(network, num_blocks=3 * LEAST_BLOCKS) for _ in range(2))
    batch = RunningBatch(model_engine(runner, None), 3)
    prompt = np.random.default_rng(5).integers(1, VOCAB, 150)
    cached = []
    for asks in (None, 2, 2, None):
        params = SamplingParams(seed=1, max_tokens=3, prompt_logprobs=asks)
        ticket = batch.submit(Request(prompt_ids=prompt, params=params))
        finish(batch)
        require_plain(reference, ticket.request, completion_of(ticket))
        cached.append(completion_of(ticket).stats.cached_tokens)
    assert cached == [0, 0, 0, 128]


@pytest.mark.parametrize("before", [1, 2])
def test_a_prompt_that_had_to_leave_is_told_once(folder: Path, before: int) -> None:
    """Somebody more urgent takes the only seat while it is cached."""
    network = decoder(folder, torch.float32)
    runner, reference = (ModelRunner(network, num_blocks=3 * LEAST_BLOCKS) for _ in range(2))
    batch = RunningBatch(model_engine(runner, None), 1)
    prompt = np.random.default_rng(5).integers(1, VOCAB, 150)
    params = SamplingParams(seed=1, max_tokens=3, prompt_logprobs=2, logprobs=1)
    ticket = batch.submit(Request(prompt_ids=prompt, params=params))
    for _ in range(before):
        batch.step()
    urgent = batch.submit(replace(a_request(7), priority=-2))
    finish(batch)
    for each in (ticket, urgent):
        require_plain(reference, each.request, completion_of(each))
    stats = completion_of(ticket).stats
    assert (stats.preemptions, stats.cached_tokens) == (1, before * 64), "what was cached before stays"


def test_transformers_says_the_same(folder: Path) -> None:
    batch = RunningBatch(model_engine(make_runner(folder, num_sequences=2), None), 1)
    ticket = batch.submit(a_request(3, max_tokens=20, temperature=1.0, ignore_eos=True))
    finish(batch)
    done, prompt = completion_of(ticket), ticket.request.prompt_ids.tolist()
    text = torch.tensor([[*prompt, *done.token_ids]])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logprobs = model(input_ids=text).logits[0, :, :VOCAB].log_softmax(dim=1)
    assert done.logprobs is not None
    assert done.prompt_logprobs is not None
    for row, entry in enumerate([*done.prompt_logprobs[1:], *done.logprobs]):
        assert entry is not None
        assert entry.token_id == text[0, row + 1]
        assert abs(entry.logprob - logprobs[row, entry.token_id]) <= TOLERANCE
        assert (torch.tensor(entry.top_logprobs) - logprobs[row, entry.top_ids]).abs().max() <= TOLERANCE
        best = logprobs[row].topk(len(entry.top_ids)).values
        assert (torch.tensor(entry.top_logprobs) - best).abs().max() <= TOLERANCE


@pytest.fixture(scope="module")
def servers() -> Iterator[RankServers]:
    made = RankServers(1)
    yield made
    made.close()


def test_two_ranks_say_the_same_in_every_way(folder: Path, servers: RankServers) -> None:
    with servers.runner(folder, 2, num_sequences=3) as runner:
        draft = ModelRunner(decoder(folder, torch.float32), num_blocks=4 * (LEAST_BLOCKS + 8))
        batch = RunningBatch(model_engine(runner, draft_engine(draft), depth=3), 3)
        tickets = [batch.submit(a_request(number)) for number in (2, 3, 6, 7)]
        finish(batch)
        for ticket in tickets:
            require_plain(runner, ticket.request, completion_of(ticket))


def test_the_reference_notices_a_row_too_late(folder: Path) -> None:
    runner = make_runner(folder)
    text = np.random.default_rng(1).integers(1, VOCAB, 20).tolist()
    logits = all_logits(runner, text)
    found = look_up(logits[:-1], np.array(text[1:]), [3] * 19, VOCAB)
    assert found == entries(logits, text, 3)
    assert look_up(logits[1:], np.array(text[1:]), [3] * 19, VOCAB) != entries(logits, text, 3)
