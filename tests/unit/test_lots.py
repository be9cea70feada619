"""Step events from the engine's thread to a caller: each by itself, or a few at a time."""

import asyncio
import time

import pytest

from outrider.cluster.hosts import _Lots
from outrider.speculation.request import Completion, StepEvent, StepOutput
from outrider.speculation.statistics import SpeculationStatistics
from outrider.speculation.types import FinishReason

DONE = Completion(
    index=0,
    text="",
    token_ids=[],
    finish_reason=FinishReason.LENGTH,
    stop_reason=None,
    stats=SpeculationStatistics(),
)


def event(token: int, completion: Completion | None = None) -> StepEvent:
    output = StepOutput(token_ids=[token], num_accepted=0, text="")
    return StepEvent(index=0, output=output, completion=completion, error=None)


def tokens_of(lots: list[list[StepEvent]]) -> list[list[int]]:
    return [[token for each in lot if each.output for token in each.output.token_ids] for lot in lots]


def lots_of(interval: float, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What arrives of six steps, 0.1 seconds apart, when everything is taken as it comes."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    async def play() -> list[list[StepEvent]]:
        lots = _Lots(asyncio.get_running_loop(), interval)
        taken = []
        for token in range(6):
            lots.bring([event(token, DONE if token == 5 else None)])
            now[0] += 0.1
            await asyncio.sleep(0)
            if not lots._arrived.empty():
                taken.append(await lots.take())
        return taken

    return tokens_of(asyncio.run(play()))


def test_without_an_interval_every_step_comes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lots_of(0.0, monkeypatch) == [[0], [1], [2], [3], [4], [5]]


def test_the_first_step_and_the_end_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lots_of(0.25, monkeypatch) == [[0], [1, 2, 3], [4, 5]]
    assert lots_of(60.0, monkeypatch) == [[0], [1, 2, 3, 4, 5]]


def test_lots_that_wait_are_taken_together() -> None:
    async def play() -> list[StepEvent]:
        lots = _Lots(asyncio.get_running_loop(), 0.0)
        for token in range(3):
            lots.bring([event(token)])
        await asyncio.sleep(0)
        return await lots.take()

    assert tokens_of([asyncio.run(play())]) == [[0, 1, 2]]
