"""Every pipeline against plain decoding on the same prompts, and the simulator's word beside it.

All ways take turns on every prompt, in an order that rotates, so that what disturbs the machine disturbs
them alike; ratios are of pairs, prompt by prompt. Tokens are compared.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outrider.cluster.bench.prediction import Prediction, drafter_text, predict
from outrider.cluster.bench.report import median_ratio, repeated_share
from outrider.cluster.bench.ways import PIPELINES, PLAIN, Rig, Way
from outrider.cluster.simulator import Costs
from outrider.models.loader import LoadedModel
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.statistics import SpeculationStatistics

WARM_UP = 2
"""Prompts that do not count, before those that do."""
LOOPING = 0.2
"""A text of whose runs of tokens more than this share are repeated is said to loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured. prompts: the first ``WARM_UP`` do not count. tokens: of every text.

    delays: round trips of the link, as shares of a target step of one row.
    """

    prompts: Sequence[str]
    tokens: int
    temperatures: Sequence[float]
    delays: Sequence[float]

    @property
    def num_texts(self) -> int:
        """That are decoded in all."""
        ways = len(PIPELINES) + 2
        return len(self.delays) * len(self.temperatures) * len(self.prompts) * ways


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One temperature over one link. round_trip: in seconds, added to the machine's own."""

    temperature: float
    delay: float
    round_trip: float


def measure(
    rig: Rig, draft: LoadedModel, plan: Plan, progress: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    """The report of every setting. draft: what the worker drafts with. progress: is told of texts done."""
    done = 0

    def one_more() -> None:
        nonlocal done
        done += 1
        progress(done)

    for delay in plan.delays:
        round_trip = delay * rig.target_seconds
        with rig.link(round_trip):
            for temperature in plan.temperatures:
                setting = Setting(temperature=temperature, delay=delay, round_trip=round_trip)
                yield _compare(rig, draft, plan, setting, one_more)


def _compare(
    rig: Rig, draft: LoadedModel, plan: Plan, setting: Setting, progress: Callable[[], None]
) -> dict[str, Any]:
    ways = rig.ways()
    order = list(ways)
    for index, prompt in enumerate(plan.prompts):
        params = _params(setting, plan, index)
        order.append(order.pop(0))
        for name in order:
            ways[name].take(prompt, params, counts=index >= WARM_UP)
            progress()
    return report(ways, _prediction(rig, draft, plan, setting, ways), setting)


def _params(setting: Setting, plan: Plan, index: int) -> SamplingParams:
    return SamplingParams(
        temperature=setting.temperature, max_tokens=plan.tokens, ignore_eos=True, seed=index
    )


def _prediction(
    rig: Rig, draft: LoadedModel, plan: Plan, setting: Setting, ways: Mapping[str, Way]
) -> Prediction:
    encode, shape = rig.llm.model.tokenizer.encode, rig.llm.engine.shape
    texts = [
        drafter_text(draft, encode(plan.prompts[index]), text, _params(setting, plan, index), shape)
        for index, text in enumerate(ways[PLAIN].texts, WARM_UP)
    ]
    drafted = {name: ways[name] for name in PIPELINES}
    return predict(ways[PLAIN], drafted, texts, shape=shape, round_trip=setting.round_trip)


def report(ways: Mapping[str, Way], prediction: Prediction, setting: Setting) -> dict[str, Any]:
    """What came of a setting; times in milliseconds, ratios over plain decoding on the target's core."""
    plain = ways[PLAIN]
    shares = [repeated_share(text) for text in plain.texts]
    straight = [index for index, share in enumerate(shares) if share <= LOOPING]
    step = plain.stats.target_seconds / plain.stats.target_steps
    return {
        "temperature": setting.temperature,
        "delay": setting.delay,
        "round_trip_ms": _ms(setting.round_trip),
        "identical": all(way.texts == plain.texts for way in ways.values()),
        "texts": len(plain.texts),
        "repeated_share": round(sum(shares) / len(shares), 3),
        "looping_texts": len(shares) - len(straight),
        "plain_tokens_per_second": round(plain.stats.num_output_tokens / sum(plain.seconds), 1),
        "plain_target_ms": _ms(step),
        "ways": {
            name: {
                **_against(way, plain, straight),
                **(_drafted(way.stats, step) if name in PIPELINES else {}),
                **_predicted(name, way, plain, prediction),
            }
            for name, way in ways.items()
            if name != PLAIN
        },
    }


def _against(way: Way, plain: Way, straight: Sequence[int]) -> dict[str, Any]:
    """Ratios over plain decoding, of all texts and of those that do not loop."""
    plainly, so = ([each.seconds[index] for index in straight] for each in (plain, way))
    return {
        "identical_texts": sum(a == b for a, b in zip(way.texts, plain.texts, strict=True)),
        "over_plain": median_ratio(plain.seconds, way.seconds),
        "over_plain_not_looping": median_ratio(plainly, so) if straight else None,
        "over_plain_without_prompts": round(plain.decoding_seconds / way.decoding_seconds, 3),
    }


def _drafted(stats: SpeculationStatistics, plain_step: float) -> dict[str, Any]:
    """c: a plain step of the target in draft steps, or None where none was taken."""
    draft_seconds = stats.draft_seconds / stats.draft_steps if stats.draft_steps else 0.0
    return {
        "c": round(plain_step / draft_seconds, 2) if draft_seconds else None,
        "mean_acceptance_length": round(stats.mean_acceptance_length, 3),
        "tokens_per_target_step": round(stats.num_output_tokens / stats.target_steps, 3),
        "rows_per_target_step": round(stats.target_rows / stats.target_steps, 2),
        "target_ms": _ms(stats.target_seconds / stats.target_steps),
        "draft_ms": _ms(draft_seconds),
        "overlap": round(stats.overlap_ratio, 3),
        "wait_ms_per_token": _ms(stats.wait_seconds / stats.num_output_tokens),
        "bytes_per_token": round(stats.bytes_per_token, 1),
        "stale_nodes": stats.stale_nodes,
        "growth_nodes": stats.growth_nodes,
        "steps_by_choice": dict(stats.steps_by_choice),
    }


def _predicted(name: str, way: Way, plain: Way, prediction: Prediction) -> dict[str, Any]:
    """The simulator's word, where it has one, and what it was told."""
    speed_up = prediction.speed_up.get(name)
    if speed_up is None:
        return {}
    measured = plain.decoding_seconds / way.decoding_seconds
    return {
        "simulated": round(speed_up, 3),
        "measured_over_simulated": round(measured / speed_up, 3),
        "told_the_simulator": _told(prediction.costs[name]),
    }


def _told(costs: Costs) -> dict[str, Any]:
    return {
        "target_ms": [_ms(seconds) for seconds in costs.target],
        "draft_ms": _ms(costs.draft[0]),
        "round_trip_ms": _ms(costs.round_trip),
        "between_forwards_ms": _ms(costs.target_overhead),
        "more_when_speculating_ms": _ms(costs.speculation_overhead),
    }


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
