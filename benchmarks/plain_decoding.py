"""Plain decoding against transformers' ``generate``, same weights, one thread, interleaved.

    python benchmarks/plain_decoding.py [--dtype bfloat16|float32] [--prompts 15] [--tokens 128]

Every prompt is decoded by transformers, by ``fast`` and by ``canonical`` numerics, in an order
that rotates; ratios are per prompt. Times include the prompt.
"""

import argparse

import torch
from common import conditions, finish
from transformers import AutoModelForCausalLM

from outrider import LLM, SamplingParams
from outrider.cluster.bench.machine import seconds_of
from outrider.cluster.bench.report import median_ratio
from outrider.models.demo import corpus, pair


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default=str(pair.TARGET))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    reference = AutoModelForCausalLM.from_pretrained(args.target, dtype=getattr(torch, args.dtype)).eval()
    engines = {
        kind: LLM(args.target, dtype=args.dtype, numerics=kind, enable_prefix_caching=False)
        for kind in ("fast", "canonical")
    }
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)

    def transformers(ids: list[int]) -> list[int]:
        with torch.inference_mode():
            out = reference.generate(
                torch.tensor([ids]), do_sample=False, max_new_tokens=args.tokens, min_new_tokens=args.tokens
            )
        return out[0, len(ids) :].tolist()

    def ours(kind: str, ids: list[int]) -> list[int]:
        return engines[kind].generate([ids], params)[0].outputs[0].token_ids

    tokenizer = engines["fast"].model.tokenizer
    prompts = [tokenizer.encode(text) for text in corpus.held_out_prompts(args.prompts)]
    ways = [("transformers", transformers), *((kind, lambda ids, k=kind: ours(k, ids)) for kind in engines)]
    for _, way in ways:
        way(prompts[0])
    times: dict[str, list[float]] = {name: [] for name, _ in ways}
    for index, ids in enumerate(prompts):
        turn = index % len(ways)
        for name, way in ways[turn:] + ways[:turn]:
            times[name].append(seconds_of(lambda way=way, ids=ids: way(ids)))
    ratios = {
        "fast over transformers": median_ratio(times["transformers"], times["fast"]),
        "canonical over transformers": median_ratio(times["transformers"], times["canonical"]),
        "price of canonical": median_ratio(times["canonical"], times["fast"]),
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})")
    rates = {name: round(args.tokens / sorted(t)[len(t) // 2], 1) for name, t in times.items()}
    finish(
        {"ratios": ratios, "tokens_per_second": rates, **conditions(dtype=args.dtype, prompts=args.prompts)}
    )


if __name__ == "__main__":
    main()
