"""How often a target of several ranks decides a near-tie otherwise than one of another size.

    python benchmarks/tensor_parallel.py [--prompts 32] [--tokens 64] [--sizes 1 2 4]

The embedded target decodes held-out prompts plainly, at temperature 0 and 1, with each size. So that four
ranks can share its six heads, each key/value head gets one more that attends and adds nothing; the model
predicts the same. Sums over more parts are other sums, so sizes may differ; all pairs of them are compared.
A size must equal itself: the same prompts in the reverse order, so beside other ones, must give the same
tokens. Exits with 1 if they do not. Ranks run on gloo and share the threads.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from common import conditions, finish
from identity import common_length
from safetensors.torch import load_file, save_file

from outrider import LLM, SamplingParams
from outrider.models.demo import corpus, pair

TEMPERATURES = (0.0, 1.0)
Texts = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default=str(pair.TARGET))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prompts = corpus.held_out_prompts(args.prompts)
    texts: dict[int, dict[float, Texts]] = {}
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        target = with_idle_heads(Path(args.target), Path(place) / "target")
        for size in args.sizes:
            texts[size], result[f"size {size}"] = of_size(target, size, prompts, args)
            print(f"size {size}: {result[f'size {size}']}", flush=True)
    for size, other in combinations(args.sizes, 2):
        for temperature in TEMPERATURES:
            name = f"sizes {size} and {other}, temperature {temperature}"
            result[name] = compare(texts[size][temperature], texts[other][temperature])
            print(f"{name}: {result[name]}", flush=True)
    broken = any(result[f"size {size}"]["texts_unlike_the_second_run"] for size in args.sizes)
    finish({**result, **conditions(dtype=args.dtype, prompts=args.prompts, tokens=args.tokens)})
    sys.exit(broken)


def with_idle_heads(source: Path, into: Path) -> Path:
    """A copy of a Llama checkpoint in which every key/value head has one query head more, of zeros."""
    shutil.copytree(source, into)
    config = json.loads((into / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    config["num_attention_heads"] = heads + groups
    (into / "config.json").write_text(json.dumps(config))
    for path in into.glob("*.safetensors"):
        tensors = load_file(path)
        for name, weight in tensors.items():
            if name.endswith("q_proj.weight"):
                by_group = weight.view(groups, -1, weight.shape[1])
                idle = by_group.new_zeros(groups, config["head_dim"], weight.shape[1])
                tensors[name] = torch.cat((by_group, idle), 1).flatten(0, 1)
            elif name.endswith("o_proj.weight"):
                by_group = weight.view(len(weight), groups, -1)
                idle = by_group.new_zeros(len(weight), groups, config["head_dim"])
                tensors[name] = torch.cat((by_group, idle), 2).flatten(1)
        save_file(tensors, path, metadata={"format": "pt"})
    return into


def of_size(
    target: Path, size: int, prompts: list[str], args: argparse.Namespace
) -> tuple[dict[float, Texts], dict[str, Any]]:
    """Texts by temperature, and how two runs of this size compare."""
    llm = LLM(
        str(target), dtype=args.dtype, tensor_parallel_size=size, max_num_seqs=args.max_num_seqs,
        enable_prefix_caching=False,
    )  # fmt: skip
    texts, unlike, seconds = {}, 0, 0.0
    with llm:
        for temperature in TEMPERATURES:
            params = SamplingParams(temperature=temperature, max_tokens=args.tokens, seed=0, ignore_eos=True)
            began = time.perf_counter()
            texts[temperature] = generated(llm, prompts, params)
            seconds += time.perf_counter() - began
            again = generated(llm, prompts[::-1], params)[::-1]
            unlike += compare(texts[temperature], again)["texts_differing"]
    made = sum(len(text) for each in texts.values() for text in each)
    return texts, {
        "texts": len(TEMPERATURES) * len(prompts),
        "texts_unlike_the_second_run": unlike,
        "tokens_per_second": round(made / seconds, 1),
    }


def generated(llm: LLM, prompts: list[str], params: SamplingParams) -> Texts:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def compare(one: Texts, other: Texts) -> dict[str, Any]:
    """A flip is the first token in which two texts differ; those behind it follow from it."""
    flips = compared = 0
    for left, right in zip(one, other, strict=True):
        same = left == right
        flips += not same
        compared += common_length(left, right) + (not same)
    return {
        "texts": len(one),
        "texts_differing": flips,
        "tokens_compared": compared,
        "flips_per_thousand_tokens": round(1000 * flips / compared, 3),
    }


if __name__ == "__main__":
    main()
