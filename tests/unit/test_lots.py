"""Step events from the engine's thread to a caller: each by itself, or a few at a time."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest

from outrider.cluster.handover import Handover, Lots
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
        handover, lots = Handover(asyncio.get_running_loop()), Lots(interval)
        taken = []
        for token in range(6):
            handover.bring(lots, [event(token, DONE if token == 5 else None)])
            handover.send()
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
        handover, lots = Handover(asyncio.get_running_loop()), Lots(0.0)
        for token in range(3):
            handover.bring(lots, [event(token)])
            handover.send()
        await asyncio.sleep(0)
        return await lots.take()

    assert tokens_of([asyncio.run(play())]) == [[0, 1, 2]]


def sent_together(monkeypatch: pytest.MonkeyPatch, starts: Sequence[int]) -> list[list[int]]:
    """Who is delivered to together, when callers begin at these steps; intervals of four steps."""
    now, calls = [100.0], list[list[int]]()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Loop:
        def call_soon_threadsafe(self, _: object, sent: list[tuple[Lots, list[StepEvent]]]) -> None:
            calls.append([callers.index(lots) for lots, _ in sent])

    stand_in: Any = Loop()
    handover = Handover(stand_in)

    async def play() -> None:
        callers.extend(Lots(4.0) for _ in starts)
        for step in range(10):
            for number, start in enumerate(starts):
                if start <= step:
                    handover.bring(callers[number], [event(step)])
            handover.send()
            now[0] += 1.0

    callers: list[Lots] = []
    asyncio.run(play())
    return calls


def test_one_wake_up_carries_what_is_due_for_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first has waited for half of its time when the second begins.
    assert sent_together(monkeypatch, [0, 2]) == [[0], [0, 1], [0, 1]]
    # It has not, and takes the others along when it is due.
    assert sent_together(monkeypatch, [0, 1, 1]) == [[0], [1, 2], [0, 1, 2], [0, 1, 2]]


def test_a_caller_that_has_gone_is_sent_nothing() -> None:
    async def play() -> bool:
        handover, lots = Handover(asyncio.get_running_loop()), Lots(0.0)
        handover.bring(lots, [event(0)])
        handover.forget(lots)
        handover.send()
        await asyncio.sleep(0)
        return lots._arrived.empty()

    assert asyncio.run(play())
