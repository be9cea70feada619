"""Speculation with a colocated draft model against plain decoding, interleaved.

    python benchmarks/serial.py [--parameters 120M] [--prompts 15] [--tokens 128]

The target is the demo target inflated to ``--parameters``; its predictions stay the same and
its cost grows. Both ways run in one process on the same threads, in alternating order; tokens
are compared, ratios are per prompt.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from common import conditions, finish

from outrider import LLM, SamplingParams
from outrider.cluster.bench.machine import seconds_of
from outrider.cluster.bench.report import median_ratio
from outrider.models.demo import corpus, pair
from outrider.models.inflate import inflate, parse_count
from outrider.speculation.statistics import SpeculationStatistics

TEMPERATURES = (0.0, 0.7, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default=str(pair.TARGET))
    parser.add_argument("--draft", default=str(pair.DRAFT))
    parser.add_argument("--parameters", type=parse_count, default=120_000_000)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--numerics", default="canonical")
    parser.add_argument("--prompts", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "target"
        inflate(Path(args.target), target, parameters=args.parameters)
        llm = LLM(
            str(target),
            speculative_config={"model": args.draft},
            dtype=args.dtype,
            numerics=args.numerics,
            max_model_len=1024,
            enable_prefix_caching=False,
        )
    prompts = corpus.held_out_prompts(args.prompts + 2)
    results = {}
    for temperature in TEMPERATURES:
        results[str(temperature)] = compare(llm, prompts, temperature, args.tokens)
    finish(
        {
            "serial over plain": results,
            **conditions(dtype=args.dtype, numerics=args.numerics, parameters=args.parameters),
        }
    )


def compare(llm: LLM, prompts: list[str], temperature: float, tokens: int) -> dict[str, object]:
    """Paired runs of one temperature; the first two prompts warm up."""
    times: dict[bool, list[float]] = {True: [], False: []}
    stats = SpeculationStatistics()
    identical = 0
    for index, prompt in enumerate(prompts):
        params = SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True, seed=index)
        seen: dict[bool, list[int]] = {}

        def run(speculative: bool, prompt: str = prompt, params: SamplingParams = params) -> None:
            choice = llm.generate(prompt, params, speculative=speculative)[0].outputs[0]
            seen[speculative] = choice.token_ids  # noqa: B023, called at once
            if speculative:
                stats.merge(choice.stats)

        order = (True, False) if index % 2 else (False, True)
        for speculative in order:
            seconds = seconds_of(lambda speculative=speculative: run(speculative))
            if index >= 2:
                times[speculative].append(seconds)
        identical += seen[True] == seen[False]
    ratio = median_ratio(times[False], times[True])
    plain, speculative = (round(tokens / statistics.median(times[way]), 1) for way in (False, True))
    print(
        f"T={temperature}: {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) times plain, "
        f"{speculative} tokens a second for {plain}, "
        f"mean acceptance length {stats.mean_acceptance_length:.2f}, "
        f"{identical} of {len(prompts)} identical"
    )
    return {
        "ratio": ratio,
        "tokens_per_second": {"plain": plain, "serial": speculative},
        "identical": identical,
        "of": len(prompts),
        **stats.as_dict(),
    }


if __name__ == "__main__":
    main()
