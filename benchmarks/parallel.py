"""Pipelines with the drafter in its own process against plain decoding, and the simulator's word.

    python benchmarks/parallel.py [--parameters 120M] [--prompts 15] [--tokens 128]

The target is the demo target inflated to ``--parameters``. Target and drafter have one core
each; plain decoding runs on the target's core, and beside it on all cores, in a process of its
own. All ways take turns on every prompt; tokens are compared, ratios are per prompt.

What was measured on the way (step times by rows, draft step, round trip, time between
forwards, and at each position the rank and the beliefs of the drafter) then goes into the
simulator, whose speed-up stands beside the measured one.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from acceptance import logits_of
from common import conditions, finish, inflated, median_ratio, seconds_of

from outrider import LLM, SamplingParams
from outrider.cluster.simulator import Costs, Text, simulate
from outrider.models.demo import corpus, pair
from outrider.models.inflate import parse_count
from outrider.models.loader import load_model
from outrider.models.numerics import Numerics
from outrider.speculation.calibration import RankCalibration
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.sampling import LogitProcessor, TokenChooser, perturb
from outrider.speculation.statistics import SpeculationStatistics
from outrider.speculation.tree import DraftTree
from outrider.speculation.types import FloatArray, IntArray

PIPELINES = ("parallel", "serial")
WARM_UP = 2
CONTEXT = 1024


Run: TypeAlias = Callable[[str, SamplingParams], tuple[list[int], SpeculationStatistics | None]]


@dataclass
class Way:
    """One way of decoding: how to run a prompt, and what came of it."""

    run: Run
    seconds: list[float] = field(default_factory=list)
    stats: SpeculationStatistics = field(default_factory=SpeculationStatistics)
    texts: list[list[int]] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draft", default=str(pair.DRAFT))
    parser.add_argument("--parameters", type=parse_count, default=120_000_000)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    result = {}
    with inflated(pair.TARGET, args.parameters) as target:
        every_core = AllCores(target, args, cores)
        os.sched_setaffinity(0, {cores[0]})
        torch.set_num_threads(1)
        llms = {name: drafted(target, name, args, cores[-1]) for name in PIPELINES}
        try:
            for temperature in args.temperatures:
                figures = compare(llms, every_core, temperature, args)
                result[str(temperature)] = figures
                print(f"T={temperature}: {figures}", flush=True)
        finally:
            every_core.close()
            for llm in llms.values():
                llm.close()
    finish({"pipelines over plain": result, **conditions(dtype=args.dtype, parameters=args.parameters)})


def drafted(target: Path, pipeline: str, args: argparse.Namespace, core: int) -> LLM:
    """A target with one drafter, which gets a core of its own."""
    config = {"model": args.draft, "workers": "local", "pipeline": pipeline}
    llm = LLM(
        str(target),
        speculative_config=config,
        dtype=args.dtype,
        max_model_len=CONTEXT,
        max_num_seqs=1,
        enable_prefix_caching=False,
    )
    assert llm.workers is not None
    assert llm.workers.local is not None
    for pid in llm.workers.local.pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})
    return llm


class AllCores:
    """Plain decoding in a process of its own, on all cores."""

    def __init__(self, target: Path, args: argparse.Namespace, cores: list[int]) -> None:
        context = get_context("spawn")
        # Its threads must not spin while the others are measured.
        os.environ["OMP_WAIT_POLICY"] = "passive"
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(target), args.dtype, len(cores)))
        self._process.start()
        assert self._pipe.recv() == "ready"

    def run(self, prompt: str, params: SamplingParams) -> tuple[list[int], None]:
        self._pipe.send((prompt, params))
        return self._pipe.recv(), None

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def _serve(pipe: Connection, target: str, dtype: str, threads: int) -> None:
    torch.set_num_threads(threads)
    llm = LLM(target, dtype=dtype, max_model_len=CONTEXT, max_num_seqs=1, enable_prefix_caching=False)
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        pipe.send(llm.generate(*asked)[0].outputs[0].token_ids)


def compare(
    llms: dict[str, LLM], every_core: AllCores, temperature: float, args: argparse.Namespace
) -> dict[str, Any]:
    ways = {name: Way(drafting(llm)) for name, llm in llms.items()}
    # Step times are learnt apart: a busy drafter may slow its neighbour down.
    alone = CostEstimates()
    ways["plain"] = Way(plainly(llms["parallel"], alone))
    ways["plain, all cores"] = Way(every_core.run)
    prompts = corpus.held_out_prompts(args.prompts + WARM_UP)
    order = list(ways)
    for index, prompt in enumerate(prompts):
        params = SamplingParams(temperature=temperature, max_tokens=args.tokens, ignore_eos=True, seed=index)
        order.append(order.pop(0))
        for name in order:
            take(ways[name], prompt, params, counts=index >= WARM_UP)
    plain = ways["plain"]
    figures: dict[str, Any] = {
        f"{name} over plain": median_ratio(plain.seconds, way.seconds)
        for name, way in ways.items()
        if name != "plain"
    }
    figures["identical"] = all(way.texts == plain.texts for way in ways.values())
    figures["plain tokens per second"] = round(args.tokens * len(plain.seconds) / sum(plain.seconds), 1)
    for name in PIPELINES:
        figures[name] = summary(ways[name].stats)
    figures["simulated"] = predict(llms, ways, alone, prompts[WARM_UP:], temperature, args)
    for name in PIPELINES:
        measured = decoding_seconds(plain) / decoding_seconds(ways[name])
        figures[f"{name} over plain, without prompts"] = round(measured, 3)
        figures[f"{name}, measured over simulated"] = round(measured / figures["simulated"][name], 3)
    return figures


def drafting(llm: LLM) -> Run:
    def run(prompt: str, params: SamplingParams) -> tuple[list[int], SpeculationStatistics]:
        choice = llm.generate(prompt, params)[0].outputs[0]
        return choice.token_ids, choice.stats

    return run


def plainly(llm: LLM, costs: CostEstimates) -> Run:
    def run(prompt: str, params: SamplingParams) -> tuple[list[int], SpeculationStatistics]:
        shared, llm.engine.costs = llm.engine.costs, costs
        choice = llm.generate(prompt, params, speculative=False)[0].outputs[0]
        llm.engine.costs = shared
        return choice.token_ids, choice.stats

    return run


def take(way: Way, prompt: str, params: SamplingParams, *, counts: bool) -> None:
    got: list[Any] = []
    seconds = seconds_of(lambda: got.append(way.run(prompt, params)))
    if counts:
        ((ids, stats),) = got
        way.seconds.append(seconds)
        way.texts.append(ids)
        if stats is not None:
            way.stats.merge(stats)


def summary(stats: SpeculationStatistics) -> dict[str, Any]:
    return {
        "mean_acceptance_length": round(stats.mean_acceptance_length, 3),
        "tokens_per_target_step": round(stats.num_output_tokens / stats.target_steps, 3),
        "rows_per_target_step": round(stats.target_rows / stats.target_steps, 2),
        "target_ms": round(1e3 * stats.target_seconds / stats.target_steps, 3),
        "draft_ms": round(1e3 * stats.draft_seconds / max(1, stats.draft_steps), 3),
        "overlap_ratio": round(stats.overlap_ratio, 3),
        "wait_seconds": round(stats.wait_seconds, 3),
        "bytes_per_token": round(stats.bytes_per_token, 1),
        "stale_nodes": stats.stale_nodes,
        "growth_nodes": stats.growth_nodes,
    }


def predict(
    llms: dict[str, LLM],
    ways: dict[str, Way],
    alone: CostEstimates,
    prompts: list[str],
    temperature: float,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Speed-ups over plain decoding, simulated text by text."""
    costs = measured_costs(llms, ways)
    plain_costs = replace(costs, target=tuple(alone.step_cost.curve(2).tolist()))
    texts = [
        drafter_text(llms["parallel"], args.draft, prompt, ids, temperature, WARM_UP + index)
        for index, (prompt, ids) in enumerate(zip(prompts, ways["plain"].texts, strict=True))
    ]
    texts = calibrated(texts)
    shape = llms["parallel"].engine.shape
    runs = {
        name: [simulate(kind, name, shape=shape, tokens=len(text.truth), text=text) for text in texts]
        for name, kind in ((None, plain_costs), *((name, costs) for name in PIPELINES))
    }
    seconds = {name: sum(run.seconds for run in each) for name, each in runs.items()}
    total = SpeculationStatistics()
    for run in runs["parallel"]:
        total.merge(run.stats)
    return {
        **{name: round(seconds[None] / seconds[name], 3) for name in PIPELINES},
        "parallel_mean_acceptance_length": round(total.mean_acceptance_length, 3),
        "parallel_tokens_per_target_step": round(total.num_output_tokens / total.target_steps, 3),
        "parallel_rows_per_target_step": round(total.target_rows / total.target_steps, 2),
        "T_target_plain_ms": round(1e3 * plain_costs.target[0], 3),
        "T_target_ms": [round(1e3 * each, 3) for each in costs.target],
        "T_draft_ms": round(1e3 * costs.draft[0], 3),
        "round_trip_ms": round(1e3 * costs.round_trip, 3),
        "between_forwards_ms": round(1e3 * costs.target_overhead, 3),
        "more_when_speculating_ms": round(1e3 * costs.speculation_overhead, 3),
    }


def calibrated(texts: list[Text]) -> list[Text]:
    """The drafter's beliefs as its calibration corrects them, once it has seen all of this."""
    calibration = RankCalibration()
    for text in texts:
        ranks = np.broadcast_to(np.arange(text.chances.shape[1]), text.chances.shape)
        calibration.observe(ranks.ravel(), text.chances.ravel(), (ranks == text.truth[:, None]).ravel())
    return [
        Text(
            text.truth,
            calibration.correct(
                np.tile(np.arange(text.chances.shape[1]), len(text.chances)), text.chances.ravel()
            ).reshape(text.chances.shape),
        )
        for text in texts
    ]


def measured_costs(llms: dict[str, LLM], ways: dict[str, Way]) -> Costs:
    engine = llms["parallel"].engine
    drafted, plain, serial = ways["parallel"], ways["plain"], llms["serial"].engine.costs
    between = between_forwards(plain)
    return Costs(
        acceptance=(1.0,),  # of no use: the texts say what the drafter guesses where
        target=tuple(engine.costs.step_cost.curve(engine.shape.num_speculative_tokens + 1).tolist()),
        draft=(drafted.stats.draft_seconds / drafted.stats.draft_steps,),
        round_trip=serial.round_trip or 0.0,
        target_overhead=between,
        speculation_overhead=max(0.0, between_forwards(drafted) - between),
    )


def decoding_seconds(way: Way) -> float:
    """Without the prompts, which the simulator leaves out."""
    return sum(way.seconds) - way.stats.prefill_seconds


def between_forwards(way: Way) -> float:
    """Seconds of a step beside its forward and waiting."""
    stats = way.stats
    return (decoding_seconds(way) - stats.target_seconds - stats.wait_seconds) / stats.target_steps


@torch.inference_mode()
def drafter_text(
    llm: LLM, draft_name: str, prompt: str, ids: list[int], temperature: float, seed: int
) -> Text:
    """What the drafter would guess at each position of a text that the target has written."""
    draft = load_model(draft_name, dtype="auto", numerics=Numerics.FAST, max_model_len=None)
    prompt_ids = np.array(llm.model.tokenizer.encode(prompt))
    tokens: IntArray = np.array(ids)
    whole = np.concatenate((prompt_ids, tokens))
    logits = logits_of(draft, whole[:-1])[len(prompt_ids) - 1 :]
    params = SamplingParams(temperature=temperature, seed=seed)
    processor = LogitProcessor(params, prompt_ids, llm.model.vocab_size, ())
    rows = np.zeros(len(tokens), np.int64)
    positions = np.arange(len(prompt_ids), len(whole))
    perturbed = perturb(
        [TokenChooser(params)], processor.process(logits, DraftTree.empty(), rows), [positions]
    )
    best, guesses = perturbed.topk(llm.engine.shape.children, dim=1)
    chances: FloatArray = (best / perturbed.sum(1, keepdim=True)).double().numpy()
    hits = guesses.numpy() == tokens[:, None]
    truth = np.where(hits.any(1), hits.argmax(1), chances.shape[1])
    return Text(truth, chances)


if __name__ == "__main__":
    main()
