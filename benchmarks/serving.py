"""Many requests at once: throughput, coordination, speculation on and off, repeated prompts.

    python benchmarks/serving.py [throughput] [coordination] [speculation] [prefix]

throughput: 16 prompts of mixed lengths, plainly, against transformers' batched ``generate``.
coordination: from the end of one forward to the start of the next, demo pair, speculation on.
speculation: on (automatic) against off with an inflated target, at several batch sizes.
prefix: a prompt of 1,000 tokens for the second time against the first.

Ways alternate within one process; ratios are of pairs.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from common import conditions, finish
from transformers import AutoModelForCausalLM

from outrider import LLM, SamplingParams
from outrider.actors.model_runner import ModelRunner
from outrider.cluster.bench.machine import seconds_of
from outrider.cluster.bench.report import median_ratio
from outrider.models.demo import corpus, pair
from outrider.models.inflate import inflated, parse_count

PARTS = ("throughput", "coordination", "speculation", "prefix")
CONTEXT = 1024
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART")
    parser.add_argument("--parameters", type=parse_count, default=120_000_000)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {}
    for part in args.parts:
        results[part] = globals()[part](args)
        print(f"{part}: {results[part]}", flush=True)
    finish({**results, **conditions(pairs=args.pairs, tokens=args.tokens)})


def mixed_prompts(count: int, tokenizer: Any, seed: int, longest: int = 128) -> list[list[int]]:
    """Held-out prompts of 16 to ``longest`` tokens."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(16, longest + 1, (count,), generator=rng).tolist()
    texts = corpus.held_out_prompts(count * (seed + 1))[-count:]
    return [(tokenizer.encode(text) * 8)[:length] for text, length in zip(texts, lengths, strict=True)]


def throughput(args: argparse.Namespace) -> dict[str, Any]:
    """Same weights and dtype; transformers pads on the left and attends with its masks."""
    reference = AutoModelForCausalLM.from_pretrained(str(pair.TARGET), dtype=torch.bfloat16).eval()
    llm = LLM(str(pair.TARGET), max_num_seqs=16, max_model_len=CONTEXT, enable_prefix_caching=False)
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)

    def theirs(prompts: Sequence[list[int]]) -> None:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(each)) + each for each in prompts])
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts])
        with torch.inference_mode():
            reference.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=args.tokens,
                min_new_tokens=args.tokens,
                pad_token_id=0,
            )

    ways = {"transformers": theirs, "ours": lambda prompts: llm.generate(prompts, params)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(args.pairs + 1):
        prompts = mixed_prompts(16, llm.model.tokenizer, index)
        for name in sorted(ways, reverse=bool(index % 2)):
            seconds = seconds_of(lambda name=name, prompts=prompts: ways[name](prompts))
            if index:
                times[name].append(seconds)
    made = 16 * args.tokens
    return {
        "ours over transformers": median_ratio(times["transformers"], times["ours"]),
        "tokens_per_second": {name: round(made / statistics.median(each), 1) for name, each in times.items()},
    }


def coordination(args: argparse.Namespace) -> dict[str, Any]:
    """Drafting is not coordination: what the drafter computes between two forwards is left out."""
    found = {}
    for batch in (1, 16):
        llm = LLM(max_num_seqs=batch, max_model_len=CONTEXT, enable_prefix_caching=False)
        gaps = watch(llm)
        params = SamplingParams(temperature=0, max_tokens=2 * args.tokens, ignore_eos=True)
        llm.generate(mixed_prompts(2 * batch, llm.model.tokenizer, 0), params)
        gaps.sort()
        found[str(batch)] = {
            "p50_ms": round(1e3 * gaps[len(gaps) // 2], 3),
            "p90_ms": round(1e3 * gaps[int(0.9 * len(gaps))], 3),
            "steps": len(gaps),
        }
    return found


def watch(llm: LLM) -> list[float]:
    """Seconds between forwards of the target, filled as it runs, without the drafter's forwards."""
    runner, drafting = llm.engine.target.runner, llm.engine.drafting
    assert isinstance(runner, ModelRunner)
    assert drafting is not None
    gaps: list[float] = []
    ended, drafted = 0.0, 0.0
    forward, grow = runner.forward, drafting.grow  # type: ignore[attr-defined]

    def timed_forward(*arguments: Any) -> Any:
        nonlocal ended, drafted
        began = time.perf_counter()
        if ended:
            gaps.append(began - ended - drafted)
        result = forward(*arguments)
        ended, drafted = time.perf_counter(), 0.0
        return result

    def timed_grow(*arguments: Any) -> Any:
        nonlocal drafted
        began = time.perf_counter()
        result = grow(*arguments)
        drafted += time.perf_counter() - began
        return result

    runner.forward = timed_forward  # type: ignore[method-assign]
    drafting.grow = timed_grow  # type: ignore[attr-defined]
    return gaps


def speculation(args: argparse.Namespace) -> dict[str, Any]:
    found = {}
    with inflated(pair.TARGET, args.parameters) as folder:
        llm = LLM(
            str(folder),
            speculative_config={"model": str(pair.DRAFT)},
            max_num_seqs=max(args.batches),
            max_model_len=CONTEXT,
            enable_prefix_caching=False,
        )
    for batch in args.batches:
        found[str(batch)] = compare(llm, batch, args)
        print(f"  batch {batch}: {found[str(batch)]}", flush=True)
    return found


def compare(llm: LLM, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Pairs of ``ROUNDS`` times as many prompts as are served at once, so that the batch is full most of
    the time; the first warms up, for the engine learns what drafting brings."""
    llm.max_num_seqs = batch
    times: dict[bool, list[float]] = {True: [], False: []}
    drafted = accepted = 0
    for index in range(args.pairs + 1):
        # Short, for speculation has nothing to do with prompts.
        prompts = mixed_prompts(ROUNDS * batch, llm.model.tokenizer, index, longest=32)
        params = SamplingParams(
            temperature=args.temperature, max_tokens=args.tokens, ignore_eos=True, seed=index
        )
        seen = {}
        for speculative in (True, False) if index % 2 else (False, True):
            began = time.perf_counter()
            outputs = llm.generate(prompts, params, speculative=speculative)
            seconds = time.perf_counter() - began
            seen[speculative] = [output.outputs[0].token_ids for output in outputs]
            if index:
                times[speculative].append(seconds)
            if speculative:
                drafted += sum(each.outputs[0].stats.num_draft_tokens for each in outputs)
                accepted += sum(each.outputs[0].stats.num_accepted_tokens for each in outputs)
        assert seen[True] == seen[False], "speculation changed the tokens"
    return {
        "on over off": median_ratio(times[False], times[True]),
        "tokens_per_second_off": round(ROUNDS * batch * args.tokens / statistics.median(times[False]), 1),
        "drafted": drafted,
        "accepted": accepted,
    }


def prefix(args: argparse.Namespace) -> dict[str, Any]:
    """Time to the first token, of the inflated target with its drafter."""
    first, again = [], []
    with inflated(pair.TARGET, args.parameters) as folder:
        llm = LLM(str(folder), speculative_config={"model": str(pair.DRAFT)}, max_model_len=CONTEXT + 64)
    params = SamplingParams(temperature=0, max_tokens=1)
    everything = [each for text in corpus.held_out_prompts(200) for each in llm.model.tokenizer.encode(text)]
    for index in range(args.pairs):
        ids = everything[37 * index :][:1000]
        assert len(ids) == 1000
        first.append(seconds_of(lambda ids=ids: llm.generate([ids], params)))
        again.append(seconds_of(lambda ids=ids: llm.generate([ids], params)))
    return {"first over second": median_ratio(first, again)}


if __name__ == "__main__":
    main()
