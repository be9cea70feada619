"""Ten thousand random requests through one engine with little memory.

    python benchmarks/soak.py [--requests 10000] [--sampled 200]

The embedded draft model is the target here, n-grams draft. Lengths, seeds, temperatures, penalties,
priorities and cancellations are random; the KV cache holds a few requests' worth, so that many have to
leave and come back. Afterwards no block may be missing, memory must be flat, and ``--sampled``
finished requests must equal their solo runs on an engine without drafter and with enough memory.
"""

import argparse
import gc
import time
from itertools import count

import numpy as np
import torch
from common import conditions, finish

from outrider import LLM, SamplingParams
from outrider.actors.model_runner import ModelRunner
from outrider.actors.running_batch import RunningBatch, Ticket
from outrider.models.demo import pair
from outrider.speculation.errors import OutriderError
from outrider.speculation.request import Request

CONTEXT = 256
MAX_NUM_SEQS = 16
ARRIVING = 1.2
"""Requests that arrive in a step, on average, as long as few enough wait."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--sampled", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    llm = LLM(
        str(pair.DRAFT),
        speculative_config={"method": "ngram"},
        max_model_len=CONTEXT,
        max_num_seqs=MAX_NUM_SEQS,
        kv_cache_memory="4MiB",
    )
    runner = llm.engine.target.runner
    assert isinstance(runner, ModelRunner)
    batch = RunningBatch(llm.engine, MAX_NUM_SEQS)
    began = time.perf_counter()
    finished, cancelled, megabytes = soak(batch, args.requests, llm.model.vocab_size)
    seconds = time.perf_counter() - began
    runner.cache.check_idle()
    rng = np.random.default_rng(1)
    sampled = rng.choice(sorted(finished), min(args.sampled, len(finished)), replace=False).tolist()
    differing = [number for number in sampled if solo(number, llm.model.vocab_size) != finished[number]]
    result = {
        "requests": args.requests,
        "finished": len(finished),
        "cancelled": cancelled,
        "preemptions": batch.num_preemptions,
        "steps": llm.engine.steps,
        "seconds": round(seconds, 1),
        "kv_blocks": runner.cache.blocks.num_blocks,
        "resident_megabytes": megabytes,
        "solo_runs": len(sampled),
        "solo_runs_that_differ": differing,
    }
    print(result)
    finish({**result, **conditions()})


def some_request(number: int, vocab: int) -> Request:
    rng = np.random.default_rng(number)
    # Few beginnings, so that texts are found again; repetitive, so that n-grams hit.
    beginning = np.random.default_rng(rng.integers(0, 50)).integers(1, vocab, 24)
    prompt = np.tile(beginning, 6)[: int(rng.integers(1, 128))]
    params = SamplingParams(
        temperature=float(rng.choice([0.0, 0.0, 0.7, 1.0])),
        seed=number,
        max_tokens=int(rng.integers(1, 48)),
        top_p=float(rng.choice([1.0, 0.9])),
        min_p=float(rng.choice([0.0, 0.05])),
        repetition_penalty=float(rng.choice([1.0, 1.2])),
        presence_penalty=float(rng.choice([0.0, 0.5])),
        ignore_eos=bool(rng.integers(0, 2)),
    )
    return Request(
        prompt_ids=prompt, params=params, priority=int(rng.integers(-1, 2)), speculative=number % 7 > 0
    )


def soak(batch: RunningBatch, requests: int, vocab: int) -> tuple[dict[int, list[int]], int, list[float]]:
    """Tokens of the finished requests, how many were cancelled, and memory at every tenth."""
    rng = np.random.default_rng(0)
    open_tickets: dict[Ticket, int] = {}
    finished: dict[int, list[int]] = {}
    numbers, cancelled = count(), 0
    submitted, megabytes = 0, list[float]()
    while submitted < requests or open_tickets:
        for _ in range(min(int(rng.poisson(ARRIVING)), requests - submitted, 64 - len(open_tickets))):
            number = next(numbers)
            open_tickets[batch.submit(some_request(number, vocab))] = number
            submitted += 1
            if submitted % (requests // 10) == 0:
                gc.collect()
                megabytes.append(round(resident_megabytes(), 1))
        if open_tickets and rng.random() < 0.05:
            victim = list(open_tickets)[int(rng.integers(len(open_tickets)))]
            batch.cancel(victim)
            del open_tickets[victim]
            cancelled += 1
        for ticket, _ in batch.step():
            if ticket.finished:
                finished[open_tickets.pop(ticket)] = tokens_of(ticket)
    return finished, cancelled, megabytes


def tokens_of(ticket: Ticket) -> list[int]:
    if ticket.completion is None:
        raise ticket.error or OutriderError("a request ended without a word")
    return ticket.completion.token_ids


_ALONE: list[LLM] = []


def solo(number: int, vocab: int) -> list[int]:
    """The same request alone, decoded plainly."""
    if not _ALONE:
        _ALONE.append(LLM(str(pair.DRAFT), max_model_len=CONTEXT, max_num_seqs=1))
    batch = RunningBatch(_ALONE[0].engine, 1)
    ticket = batch.submit(some_request(number, vocab))
    while not ticket.finished:
        batch.step()
    return tokens_of(ticket)


def resident_megabytes() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


if __name__ == "__main__":
    main()
