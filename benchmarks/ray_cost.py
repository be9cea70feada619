"""What Ray costs: a cluster's tokens per second over those of the launcher without Ray.

    python benchmarks/ray_cost.py [--parameters 120M] [--prompts 15] [--tokens 128]

Both have one target, the demo target inflated to ``--parameters``, and one draft worker, with one
thread each. They take turns on every prompt, every way of decoding and temperature; whoever is
not asked sleeps. Tokens are compared, ratios are per prompt.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from common import conditions, finish

from outrider import LLM, Cluster, SamplingParams
from outrider.cluster.bench.report import median_ratio
from outrider.cluster.cluster_config import parse_config
from outrider.cluster.generation import TextGenerator
from outrider.models.demo import corpus, pair
from outrider.models.inflate import inflated, parse_count

PIPELINES = (None, "serial", "parallel")
"""Ways of decoding; None is plainly."""
WARM_UP = 2
CONTEXT = 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=parse_count, default=120_000_000)
    parser.add_argument("--prompts", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = {}
    with (
        inflated(pair.TARGET, args.parameters) as target,
        # First, for Ray forks, which may get stuck beside threads of gRPC.
        on_ray(target) as cluster,
        without_ray(target) as local,
    ):
        for temperature in args.temperatures:
            for pipeline in PIPELINES:
                name = f"T={temperature:g} {pipeline or 'plain'}"
                result[name] = compare(local, cluster, pipeline, temperature, args)
                print(f"{name}: {result[name]}", flush=True)
    finish({"cluster over local launcher": result, **conditions(parameters=args.parameters)})


def without_ray(target: Path) -> LLM:
    config = {"model": str(pair.DRAFT), "workers": "local"}
    return LLM(
        str(target),
        speculative_config=config,
        max_model_len=CONTEXT,
        max_num_seqs=1,
        enable_prefix_caching=False,
    )


def on_ray(target: Path) -> Cluster:
    values = {
        "name": f"ray-cost-{os.getpid()}",
        "target": {
            "model": str(target),
            "max_num_seqs": 1,
            "max_model_len": CONTEXT,
        },
        "draft": {"model": str(pair.DRAFT)},
    }
    return Cluster(parse_config(values, "ray_cost.py"))


def compare(
    local: LLM, cluster: Cluster, pipeline: str | None, temperature: float, args: argparse.Namespace
) -> dict[str, Any]:
    ways: list[TextGenerator] = [local, cluster]
    seconds: dict[TextGenerator, list[float]] = {way: [] for way in ways}
    texts: dict[TextGenerator, list[list[int]]] = {way: [] for way in ways}
    for index, prompt in enumerate(corpus.held_out_prompts(args.prompts + WARM_UP)):
        params = SamplingParams(temperature=temperature, max_tokens=args.tokens, ignore_eos=True, seed=index)
        ways.reverse()
        for way in ways:
            began = time.perf_counter()
            texts[way].append(decode(way, prompt, params, pipeline))
            if index >= WARM_UP:
                seconds[way].append(time.perf_counter() - began)
    return {
        "ratio": median_ratio(seconds[local], seconds[cluster]),
        "identical": texts[local] == texts[cluster],
        "local tokens per second": round(args.tokens * args.prompts / sum(seconds[local]), 1),
        "cluster tokens per second": round(args.tokens * args.prompts / sum(seconds[cluster]), 1),
    }


def decode(way: TextGenerator, prompt: str, params: SamplingParams, pipeline: str | None) -> list[int]:
    _, (request,) = way.prepare(prompt, params, speculative=pipeline is not None, pipeline=pipeline)
    return way.complete(request).token_ids


if __name__ == "__main__":
    main()
