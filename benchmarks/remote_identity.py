"""Tokens with drafters in other processes against plain decoding, over held-out prompts.

    python benchmarks/remote_identity.py [--prompts 50] [--tokens 128] [--at-once 8]

For each dtype and temperature, pipelines ``parallel`` and ``serial`` over the wire must give the
tokens of plain decoding; exits with 1 if one differs, or if nothing was drafted. Accepted
tokens are attributed to the worker's process and bytes are counted at the wire.
"""

import argparse
import sys
from typing import Any

import torch
from common import conditions, finish

from outrider import LLM, SamplingParams
from outrider.models.demo import corpus, pair
from outrider.speculation.statistics import SpeculationStatistics

TEMPERATURES = (0.0, 0.7, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default=str(pair.TARGET))
    parser.add_argument("--draft", default=str(pair.DRAFT))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--at-once", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    sound = True
    for dtype in args.dtypes:
        for pipeline in ("parallel", "serial"):
            config = {"model": args.draft, "workers": "local", "pipeline": pipeline}
            with LLM(args.target, speculative_config=config, dtype=dtype, max_num_seqs=args.at_once) as llm:
                for temperature in TEMPERATURES:
                    figures = compare(llm, temperature, args)
                    result[f"{dtype}, {pipeline}, temperature {temperature}"] = figures
                    print(f"{dtype}, {pipeline}, temperature {temperature}: {figures}", flush=True)
                    sound &= figures["texts_differing"] == 0
                    sound &= sum(figures["accepted_by_drafter"].values()) > 0
    finish({"remote identity": result, **conditions(at_once=args.at_once)})
    sys.exit(not sound)


def compare(llm: LLM, temperature: float, args: argparse.Namespace) -> dict[str, Any]:
    params = SamplingParams(temperature=temperature, max_tokens=args.tokens, seed=7)
    prompts = corpus.held_out_prompts(args.prompts)
    drafted, plain = (llm.generate(prompts, params, speculative=each) for each in (True, False))
    total = SpeculationStatistics()
    differing = 0
    for one, other in zip(drafted, plain, strict=True):
        total.merge(one.outputs[0].stats)
        differing += one.outputs[0].token_ids != other.outputs[0].token_ids
    return {
        "texts": len(prompts),
        "texts_differing": differing,
        "tokens": total.num_output_tokens,
        "accepted_by_drafter": total.accepted_by_drafter,
        "mean_acceptance_length": round(total.mean_acceptance_length, 3),
        "growth_bytes": total.growth_bytes,
        "sent_bytes": total.sent_bytes,
        "bytes_per_token": round(total.bytes_per_token, 1),
    }


if __name__ == "__main__":
    main()
