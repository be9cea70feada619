"""What ``outrider demo`` measures: the same prompts, plainly and with a draft worker."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from outrider.cluster.generation import TextGenerator
from outrider.speculation.request import Completion
from outrider.speculation.sampling_params import SamplingParams

PROMPTS = (
    "def fibonacci(n):\n    ",
    "import os\nimport sys\n\ndef main():\n    ",
    "class Stack:\n    def __init__(self):\n        ",
)
TEMPERATURES = (0.0, 1.0)
SEED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """One way to generate: plainly, or with a pipeline."""

    name: str
    pipeline: str | None


MODES = (
    Mode(name="plain", pipeline=None),
    Mode(name="serial", pipeline="serial"),
    Mode(name="parallel", pipeline="parallel"),
)


@dataclass(slots=True, kw_only=True)
class Measurement:
    """What one mode did at one temperature. seconds: of each prompt, first token to last."""

    mode: Mode
    temperature: float
    completions: list[Completion] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Median over the prompts: a machine is seldom left alone."""
        return statistics.median(
            len(each.token_ids) / taken for each, taken in zip(self.completions, self.seconds, strict=True)
        )

    @property
    def mean_acceptance_length(self) -> float | None:
        """Tokens per verification of the target; None for plain decoding."""
        if self.mode.pipeline is None:
            return None
        drafts = sum(each.stats.num_drafts for each in self.completions)
        return 1 + sum(each.stats.num_accepted_tokens for each in self.completions) / max(1, drafts)

    @property
    def overlap(self) -> float | None:
        """The part of drafting that the target's steps hid."""
        drafting = sum(each.stats.draft_seconds for each in self.completions)
        hidden = sum(each.stats.overlapped_draft_seconds for each in self.completions)
        return hidden / drafting if drafting else None


def measure(
    cluster: TextGenerator, max_tokens: int, temperatures: tuple[float, ...] = TEMPERATURES
) -> Iterator[Measurement]:
    """Every mode at every temperature; the modes take turns prompt by prompt.

    A measurement comes after each completion, the same one growing.
    """
    for temperature in temperatures:
        rows = [Measurement(mode=mode, temperature=temperature) for mode in MODES]
        for prompt in PROMPTS:
            for row in rows:
                done, seconds = _timed(cluster, prompt, row.mode, temperature, max_tokens)
                row.completions.append(done)
                row.seconds.append(seconds)
                yield row


def same_tokens(plain: Measurement, other: Measurement) -> bool:
    """Whether two measurements of the same prompts gave the same tokens."""
    texts = [[each.token_ids for each in row.completions] for row in (plain, other)]
    return texts[0] == texts[1]


def params_of(temperature: float, max_tokens: int) -> SamplingParams:
    """What every mode is asked for."""
    return SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=SEED, ignore_eos=True)


def _timed(
    cluster: TextGenerator, prompt: str, mode: Mode, temperature: float, max_tokens: int
) -> tuple[Completion, float]:
    _, (request,) = cluster.prepare(
        prompt,
        params_of(temperature, max_tokens),
        speculative=mode.pipeline is not None,
        pipeline=mode.pipeline,
    )
    began = time.perf_counter()
    done = cluster.complete(request)
    return done, time.perf_counter() - began
