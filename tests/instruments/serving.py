"""Running requests on engines, and what came out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from instruments.table_lm import TableLM
from outrider.actors.drafting import DraftEngine
from outrider.actors.target_engine import TargetEngine, TargetModel
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.request import Request, StepOutput
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.statistics import SpeculationStatistics
from outrider.speculation.stopping import TextSource
from outrider.speculation.verifiers.registry import make_verifier

EOS = 0


class Letters:
    """A detokeniser: ``a`` for token 0 and so on; it lags, as one that waits for whole characters."""

    def __init__(self, lag: int = 0) -> None:
        self._lag, self._pending = lag, ""

    def push(self, ids: Sequence[int]) -> str:
        self._pending += "".join(chr(ord("a") + token) for token in ids)
        certain = max(0, len(self._pending) - self._lag)
        text, self._pending = self._pending[:certain], self._pending[certain:]
        return text

    def flush(self) -> str:
        text, self._pending = self._pending, ""
        return text


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished request."""

    token_ids: list[int]
    text: str
    streamed: str
    finish_reason: str | None
    stop_reason: int | str | None
    steps: list[StepOutput]
    stats: SpeculationStatistics

    @property
    def answer(self) -> tuple[object, ...]:
        """All that a user sees; speculation must not change it."""
        return self.token_ids, self.text, self.streamed, self.finish_reason, self.stop_reason


def table_engine(
    lm: TableLM,
    drafting: DraftEngine | None = None,
    *,
    budget: int = 8,
    depth: int = 1,
    eos_ids: tuple[int, ...] = (),
    adaptive: bool = False,
    lag: int = 0,
) -> TargetEngine:
    """Takes ``depth`` draft steps and verifies ``budget`` nodes, or if ``adaptive`` what seems to pay.

    Every step takes a hundredth of a second on its clock.
    """

    def detokenizer(request: Request) -> TextSource:  # noqa: ARG001
        return Letters(lag)

    target = TargetModel(runner=lm, vocab_size=lm.vocab_size, eos_ids=eos_ids, detokenizer=detokenizer)
    shape = TreeShape(num_speculative_tokens=budget, depth=depth, adaptive=adaptive)
    ticks = count()
    return TargetEngine(
        target,
        verifier=make_verifier("coupled"),
        drafting=drafting,
        shape=shape,
        clock=lambda: next(ticks) / 100,
    )


def serve(engine: TargetEngine, prompt: Sequence[int], params: SamplingParams, **request: Any) -> Outcome:
    """Steps a request to its end; every step must commit something, and agree with the stream."""
    steps: list[StepOutput] = []
    with engine.start(Request(prompt_ids=np.array(prompt, np.int64), params=params, **request)) as run:
        while not run.finished:
            step = run.step()
            assert step.token_ids, "a target forward committed nothing"
            assert 0 <= step.num_accepted <= len(step.token_ids)
            steps.append(step)
    assert all(step.finish_reason is None for step in steps[:-1])
    return Outcome(
        token_ids=[token for step in steps for token in step.token_ids],
        text=run.text,
        streamed="".join(step.text for step in steps),
        finish_reason=steps[-1].finish_reason,
        stop_reason=steps[-1].stop_reason,
        steps=steps,
        stats=run.stats,
    )
