"""What the simulator says of a measurement: the same texts, at the costs that were measured on the way.

The simulator is told the step times by rows, the draft step, the round trip, the time between two forwards,
and, at each position of the target's texts, the rank of its token among the drafter's guesses and what the
drafter believed of them. Then it runs the pipelines themselves (``cluster/simulator.py``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from outrider.actors.model_runner import ModelRunner
from outrider.cluster.bench.ways import Way
from outrider.cluster.simulator import Costs, Simulated, Text, simulate
from outrider.kernels.guesses import guesses
from outrider.models.batch import text_rows
from outrider.models.block_pool import blocks_for
from outrider.models.kv_cache import KVSequence
from outrider.models.loader import LoadedModel
from outrider.models.numerics import MAX_ROWS
from outrider.speculation.calibration import LOWEST_SCORE, RankCalibration, TextCredit
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.pipelines.linger import LingerRule
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.sampling import LogitProcessor, TokenChooser, streams_of
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.tree import DraftTree
from outrider.speculation.types import FloatArray, IntArray


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """By pipeline. speed_up: over plain decoding, prompts left out. costs: what the simulator was told."""

    speed_up: dict[str, float]
    costs: dict[str, Costs]


def predict(
    plain: Way, drafted: dict[str, Way], texts: Sequence[Text], *, shape: TreeShape, round_trip: float
) -> Prediction:
    """Every pipeline over all texts; one whose drafter took no step is left out.

    plain, drafted: measured. texts: see ``drafter_text``. round_trip: seconds that the link took at least.
    """
    texts = _calibrated(texts)
    trip = max(round_trip, _learnt(drafted["serial"]).round_trip or 0.0)
    costs = {
        name: _measured_costs(way, plain, trip, shape)
        for name, way in drafted.items()
        if way.stats.draft_steps
    }
    seconds = _seconds(_plain_costs(plain), None, texts, shape)
    return Prediction(
        speed_up={name: seconds / _seconds(each, name, texts, shape) for name, each in costs.items()},
        costs=costs,
    )


@torch.inference_mode()
def drafter_text(
    draft: LoadedModel, prompt: Sequence[int], text: Sequence[int], params: SamplingParams, shape: TreeShape
) -> Text:
    """What the drafter would guess at each position of a text that the target has written to a prompt."""
    prompt_ids, tokens = np.array(prompt), np.array(text)
    whole = np.concatenate((prompt_ids, tokens))
    logits = logits_of(draft, whole[:-1])[len(prompt_ids) - 1 :]
    processor = LogitProcessor(params, prompt_ids, logits.shape[1], ())
    rows = np.zeros(len(tokens), np.int64)
    processed = processor.process(logits, DraftTree.empty(), rows)
    streams = streams_of([TokenChooser(params)], [np.arange(len(prompt_ids), len(whole))])
    guessed, chances = guesses(processed, streams, shape.children)
    hits = guessed == tokens[:, None]
    return Text(np.where(hits.any(1), hits.argmax(1), chances.shape[1]), chances)


def logits_of(model: LoadedModel, ids: IntArray) -> torch.Tensor:
    """Logits ``[len(ids), vocab]`` of a text."""
    runner = ModelRunner(model.decoder, num_blocks=blocks_for(len(ids)))
    sequence = KVSequence(runner.cache)
    sequence.reserve(len(ids))
    parts = []
    for start in range(0, len(ids), MAX_ROWS):
        rows = text_rows(sequence, ids[start : start + MAX_ROWS], first_logit_row=0)
        parts.append(runner.forward([rows]))
        sequence.length += len(rows.tokens)
    return torch.cat(parts)


def _seconds(costs: Costs, pipeline: str | None, texts: Sequence[Text], shape: TreeShape) -> float:
    # One rule for all texts, as in an engine, which learns from each.
    linger = LingerRule()
    runs: list[Simulated] = [
        simulate(costs, pipeline, shape=shape, tokens=len(text.truth), text=text, linger=linger)
        for text in texts
    ]
    return sum(run.seconds for run in runs)


def _measured_costs(way: Way, plain: Way, round_trip: float, shape: TreeShape) -> Costs:
    return Costs(
        acceptance=(1.0,),  # of no use: the texts say what the drafter guesses where
        target=tuple(_learnt(way).step_cost.curve(shape.num_speculative_tokens + 1).tolist()),
        draft=(way.stats.draft_seconds / way.stats.draft_steps,),
        round_trip=round_trip,
        target_overhead=plain.between_forwards,
        speculation_overhead=max(0.0, way.between_forwards - plain.between_forwards),
    )


def _plain_costs(plain: Way) -> Costs:
    """Of steps that no drafter disturbs; what is said of drafting is not used."""
    return Costs(
        acceptance=(1.0,),
        target=tuple(_learnt(plain).step_cost.curve(2).tolist()),
        draft=(1.0,),
        target_overhead=plain.between_forwards,
    )


def _learnt(way: Way) -> CostEstimates:
    assert way.costs is not None
    return way.costs


def _calibrated(texts: Sequence[Text]) -> list[Text]:
    """The drafter's beliefs as its calibration corrects them, once it has seen all of this."""
    calibration = RankCalibration()
    for text in texts:
        ranks = _ranks(text)
        calibration.observe(ranks.ravel(), text.chances.ravel(), (ranks == text.truth[:, None]).ravel())
    corrected = [calibration.correct(_ranks(text).ravel(), text.chances.ravel()) for text in texts]
    return [
        Text(text.truth, _credited(text.truth, each.reshape(text.chances.shape)))
        for text, each in zip(texts, corrected, strict=True)
    ]


def _credited(truth: IntArray, chances: FloatArray) -> FloatArray:
    """What is believed at each position after those before it."""
    credit, factors = TextCredit(), []
    for rank, expected in zip(truth.tolist(), chances.sum(axis=1).tolist(), strict=True):
        factors.append(credit.factor)
        credit.observe(1, hits=int(rank < chances.shape[1]), expected=expected)
    believed: FloatArray = np.clip(np.array(factors)[:, None] * chances, LOWEST_SCORE, 1.0)
    return believed


def _ranks(text: Text) -> IntArray:
    """``[positions, ranks]``."""
    return np.broadcast_to(np.arange(text.chances.shape[1]), text.chances.shape)
