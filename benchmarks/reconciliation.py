"""What taking in remote growth costs the target between two steps, and what growth weighs.

    python benchmarks/reconciliation.py [--parameters 120M] [--batches 1 16] [--tokens 128]

The target drafts with one local worker, pipeline ``parallel``. Reconciliation is everything
from draining the inbox to the grown trees, measured around ``DraftPool.poll``; selecting and
committing are reported beside it, for they are policy's other work between two forwards.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import conditions, finish

from outrider import LLM, SamplingParams
from outrider.actors.draft_pool import DraftPool
from outrider.models.demo import corpus, pair
from outrider.models.inflate import inflated, parse_count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=parse_count, default=120_000_000)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = {}
    with inflated(pair.TARGET, args.parameters) as target:
        for batch in args.batches:
            result[str(batch)] = measure(str(target), batch, args)
            print(f"batch {batch}: {result[str(batch)]}", flush=True)
    finish({"reconciliation": result, **conditions(dtype=args.dtype, parameters=args.parameters)})


def measure(target: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    config = {"model": str(pair.DRAFT), "workers": {"max_sessions": batch}}
    with LLM(
        target, speculative_config=config, dtype=args.dtype, max_model_len=1024, max_num_seqs=batch
    ) as llm:
        assert llm.workers is not None
        polls, sizes = watch(llm.workers.pool)
        params = SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True, seed=0)
        outputs = llm.generate(corpus.held_out_prompts(2 * batch), params)
        steps = llm.engine.steps
    seconds = sorted(polls)
    return {
        "steps": steps,
        "milliseconds_per_step": round(1e3 * sum(polls) / steps, 4),
        "median_milliseconds": round(1e3 * statistics.median(polls), 4),
        "p99_milliseconds": round(1e3 * seconds[int(0.99 * (len(seconds) - 1))], 4),
        "growth_messages": len(sizes),
        "median_growth_bytes": statistics.median(sizes),
        "largest_growth_bytes": max(sizes),
        "accepted": sum(each.outputs[0].stats.num_accepted_tokens for each in outputs),
    }


def watch(pool: DraftPool) -> tuple[list[float], list[int]]:
    """Seconds of every poll, and bytes of every growth message, as they come."""
    polls: list[float] = []
    sizes: list[int] = []
    poll: Callable[..., None] = pool.poll
    for link in pool._links:
        receive = link.channel.receive

        def weighed(receive: Callable[[], Any] = receive) -> Any:
            arrived = receive()
            sizes.extend(each.num_bytes for each in arrived if each.num_bytes)
            return arrived

        link.channel.receive = weighed  # type: ignore[method-assign]

    def timed(*args: Any) -> None:
        began = time.perf_counter()
        poll(*args)
        polls.append(time.perf_counter() - began)

    pool.poll = timed  # type: ignore[method-assign]
    return polls, sizes


if __name__ == "__main__":
    main()
