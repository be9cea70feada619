"""Tokens with speculation on and off over held-out prompts, and how often ``fast`` differs.

    python benchmarks/identity.py [--prompts 200] [--tokens 128]

Canonical numerics must give the same tokens every time; exits with 1 if they do not. For
``fast`` numerics the share of texts that differ, and of tokens up to the first difference,
is reported: a flip is one near-tie decided the other way.
"""

import argparse
import sys

import torch
from common import conditions, finish

from outrider import LLM, SamplingParams
from outrider.models.demo import corpus, pair

SETTINGS = {
    "temperature 0": {"temperature": 0.0},
    "temperature 0.7, top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "temperature 1": {"temperature": 1.0},
    "temperature 1, penalties, n = 2": {
        "temperature": 1.0, "repetition_penalty": 1.1, "presence_penalty": 0.3,
        "frequency_penalty": 0.2, "n": 2,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default=str(pair.TARGET))
    parser.add_argument("--draft", default=str(pair.DRAFT))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, object] = {}
    broken = False
    # Always drafting, so that every step of the comparison verifies a tree.
    config = {"model": args.draft, "num_speculative_tokens": 8, "tree": {"adaptive": False, "depth": 4}}
    for numerics in ("canonical", "fast"):
        llm = LLM(args.target, speculative_config=config, dtype=args.dtype, numerics=numerics)
        for name, setting in SETTINGS.items():
            figures = compare(llm, corpus.held_out_prompts(args.prompts), setting, args.tokens)
            result[f"{numerics}, {name}"] = figures
            print(f"{numerics}, {name}: {figures}", flush=True)
            broken |= numerics == "canonical" and figures["texts_differing"] != 0
    finish({"identity": result, **conditions(dtype=args.dtype, prompts=args.prompts, tokens=args.tokens)})
    sys.exit(broken)


def compare(llm: LLM, prompts: list[str], setting: dict[str, float], tokens: int) -> dict[str, object]:
    differing = compared = texts = accepted = 0
    for index, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=tokens, seed=index, **setting)  # type: ignore[arg-type]
        with_drafts, plain = (
            llm.generate(prompt, params, speculative=speculative)[0].outputs for speculative in (True, False)
        )
        for one, other in zip(with_drafts, plain, strict=True):
            texts += 1
            accepted += one.stats.num_accepted_tokens
            same = one.token_ids == other.token_ids
            differing += not same
            compared += common_length(one.token_ids, other.token_ids) + (not same)
    return {
        "texts": texts,
        "texts_differing": differing,
        "tokens_compared": compared,
        "flips_per_thousand_tokens": round(1000 * differing / compared, 3),
        "accepted_draft_tokens": accepted,
    }


def common_length(one: list[int], other: list[int]) -> int:
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


if __name__ == "__main__":
    main()
