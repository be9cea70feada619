"""Outrider against others' speculative decoding: same weights, same prompts, temperature 0.

    python benchmarks/others.py [--parameters 120M] [--prompts 15] [--tokens 128]
        [--pearl CHECKOUT] [--amusd CHECKOUT]

The target is the demo target inflated to ``--parameters``. Every prompt is decoded by transformers'
``generate`` plainly, assisted by the draft model and by prompt lookup; by Outrider plainly, in one process
(``serial``) and with a draft worker (``parallel``), with automatic settings; and by the reference
implementations of PEARL and AMUSD whose checkouts are given (see ``reference.py``). The ways take turns in an
order that rotates, with one thread per process: targets on the first core, drafters in processes of their own
on the last. Ratios are per prompt and include the prompt; the first two prompts warm up. Every text of
Outrider's must be that of its plain decoding; others' are compared with transformers' plain ones, which in
bfloat16 differ where tokens nearly tie.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from common import conditions, finish
from reference import REFERENCES, Answer, Setup, reference
from transformers import AutoModelForCausalLM

from outrider import LLM, SamplingParams
from outrider.cluster.bench.machine import seconds_of
from outrider.cluster.bench.pipeline import LOOPING, WARM_UP
from outrider.cluster.bench.report import median_ratio, repeated_share
from outrider.cluster.bench.ways import alone_on, move_process
from outrider.models.demo import corpus, pair
from outrider.models.inflate import inflated, parse_count

PLAIN, OURS = "plain", ("serial", "parallel")
TRANSFORMERS = "transformers"
CONTEXT = 1024
LOOKUP_TOKENS = 10
"""What transformers' documentation suggests."""
LEAST_WINDOW = 2

Way = Callable[[list[int]], Answer]


def transformers_ways(target: Path, draft: str, dtype: str, tokens: int) -> tuple[dict[str, Way], Way]:
    """Plain, assisted and prompt lookup; and the draft model alone. Texts end by length only."""
    model, assistant = (
        AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        for path in (target, draft)
    )
    for each in (model, assistant):
        each.generation_config.eos_token_id = None

    def way(generator: Any, **more: Any) -> Way:
        @torch.inference_mode()
        def run(ids: list[int]) -> Answer:
            prompt = torch.tensor([ids])
            out = generator.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=tokens, **more
            )
            return Answer(out[0, len(ids) :].tolist())

        return run

    ways = {
        TRANSFORMERS: way(model),
        "assisted": way(model, assistant_model=assistant),
        "prompt lookup": way(model, prompt_lookup_num_tokens=LOOKUP_TOKENS),
    }
    return ways, way(assistant)


def engines(opened: ExitStack, target: Path, draft: str, dtype: str, core: int) -> tuple[LLM, LLM]:
    """One that drafts in this process, and one with a worker on this core."""

    def engine(**config: str) -> LLM:
        return opened.enter_context(
            LLM(
                str(target),
                speculative_config={"model": draft, **config},
                dtype=dtype,
                max_model_len=CONTEXT,
                enable_prefix_caching=False,
            )
        )

    colocated, separate = engine(), engine(workers="local")
    assert separate.workers is not None
    assert separate.workers.local is not None
    for pid in separate.workers.local.pids:
        move_process(pid, core)
    return colocated, separate


def outrider_ways(colocated: LLM, separate: LLM, tokens: int) -> dict[str, Way]:
    """Plain, serial and parallel."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)

    def way(llm: LLM, speculative: bool) -> Way:
        return lambda ids: Answer(
            llm.generate([ids], params, speculative=speculative)[0].outputs[0].token_ids
        )

    return {PLAIN: way(colocated, False), "serial": way(colocated, True), "parallel": way(separate, True)}


def window_of(target: Way, draft: Way, ids: list[int]) -> int:
    """PEARL's best window by its paper: a target step in draft steps, here both of transformers."""
    seconds = []
    for way in (target, draft):
        way(ids)
        seconds.append(seconds_of(lambda way=way: way(ids)))
    return max(LEAST_WINDOW, round(seconds[0] / seconds[1]))


def measured(
    ways: dict[str, Way], prompts: list[list[int]]
) -> tuple[dict[str, list[float]], dict[str, list[Answer]]]:
    """Seconds and answers by way, without the prompts that warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[Answer]] = {name: [] for name in ways}
    order = list(ways)
    for index, ids in enumerate(prompts):
        order.append(order.pop(0))
        for name in order:
            began = time.perf_counter()
            answer = ways[name](ids)
            ended = time.perf_counter()
            if index >= WARM_UP:
                seconds[name].append(ended - began)
                answers[name].append(answer)
        print(f"{index + 1} of {len(prompts)} prompts", file=sys.stderr, flush=True)
    return seconds, answers


def report(seconds: dict[str, list[float]], answers: dict[str, list[Answer]], tokens: int) -> dict[str, Any]:
    """What ``finish`` prints of it."""
    texts = {name: [answer.tokens for answer in each] for name, each in answers.items()}
    loops = [repeated_share(text) for text in texts[PLAIN]]
    straight = [index for index, share in enumerate(loops) if share <= LOOPING]

    def over(ours: str, other: str, chosen: list[int]) -> dict[str, float] | None:
        both = [[seconds[name][index] for index in chosen] for name in (other, ours)]
        return median_ratio(*both) if chosen else None

    everything = list(range(len(loops)))
    return {
        "tokens_per_second": {
            name: round(tokens / sorted(each)[len(each) // 2], 1) for name, each in seconds.items()
        },
        **{
            f"{ours} over": {
                other: {"all": over(ours, other, everything), "not_looping": over(ours, other, straight)}
                for other in seconds
                if other not in OURS
            }
            for ours in OURS
        },
        "texts": len(loops),
        "not_looping": len(straight),
        "repeated_share": round(sum(loops) / len(loops), 3),
        "differing_from_plain": {
            name: differing(texts[name], texts[PLAIN]) for name in (*OURS, TRANSFORMERS)
        },
        "differing_from_transformers": {
            name: differing(texts[name], texts[TRANSFORMERS])
            for name in texts
            if name not in (*OURS, PLAIN, TRANSFORMERS)
        },
        "unverified": {
            name: unverified(answers[name], texts[TRANSFORMERS]) for name in REFERENCES if name in answers
        },
    }


def differing(texts: list[list[int]], reference: list[list[int]]) -> int:
    return sum(text != wanted for text, wanted in zip(texts, reference, strict=True))


def unverified(answers: list[Answer], reference: list[list[int]]) -> dict[str, int]:
    """Texts that end with tokens that nobody verified, and those that are wrong there only."""
    wrong = 0
    for answer, wanted in zip(answers, reference, strict=True):
        sure = len(wanted) - answer.unverified
        wrong += answer.tokens != wanted and answer.tokens[:sure] == wanted[:sure]
    return {"texts": sum(answer.unverified > 0 for answer in answers), "wrong_there_only": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default=str(pair.TARGET))
    parser.add_argument("--draft", default=str(pair.DRAFT))
    parser.add_argument("--parameters", type=parse_count, default=120_000_000)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=128)
    for name in REFERENCES:
        parser.add_argument(f"--{name}", metavar="CHECKOUT", type=Path)
    parser.add_argument("--window", type=int, help="PEARL's; by default target steps in draft steps")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as opened:
        target = opened.enter_context(inflated(Path(args.target), args.parameters))
        scratch = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        opened.enter_context(alone_on(cores[0]))
        llms = engines(opened, target, args.draft, args.dtype, cores[-1])
        encode = llms[0].model.tokenizer.encode
        prompts = [encode(text) for text in corpus.held_out_prompts(WARM_UP + args.prompts)]
        ways, drafting = transformers_ways(target, args.draft, args.dtype, args.tokens)
        setup = {
            "target": target,
            "draft": Path(args.draft),
            "dtype": args.dtype,
            "tokens": args.tokens,
            "window": args.window or window_of(ways[TRANSFORMERS], drafting, prompts[0]),
            "cores": (cores[-1], cores[0]),
        }
        ways |= outrider_ways(*llms, args.tokens)
        for name in REFERENCES:
            if checkout := getattr(args, name):
                running = reference(name, Setup(checkout=checkout, store=scratch / name, **setup))
                ways[name] = opened.enter_context(running).run
        result = report(*measured(ways, prompts), args.tokens)
        for name in OURS:
            for other, ratios in result[f"{name} over"].items():
                print(f"{name} over {other}: {ratios['all']}; not looping: {ratios['not_looping']}")
        used = conditions(dtype=args.dtype, parameters=args.parameters, tokens=args.tokens)
    finish({**result, "pearl_window": setup["window"], **used})
    if any(result["differing_from_plain"][name] for name in OURS):
        sys.exit("a text of Outrider's is not that of its plain decoding")


if __name__ == "__main__":
    main()
