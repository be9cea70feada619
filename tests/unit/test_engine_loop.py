"""An engine on a thread of its own: what it is told happens between steps, and it ends when closed."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from instruments.processes import SECONDS, until
from instruments.serving import table_engine
from instruments.table_lm import TableLM

from outrider.actors.engine_loop import EngineLoop
from outrider.actors.request_run import RequestRun
from outrider.actors.running_batch import RunningBatch
from outrider.speculation.errors import InvalidRequestError
from outrider.speculation.request import Request, StepEvent, StepOutput
from outrider.speculation.sampling_params import SamplingParams

UNKNOWN = 99
"""A token that the engine refuses."""


class SteppedEngine:
    """An engine whose steps wait until they are let through."""

    def __init__(self) -> None:
        self.lm = TableLM.cycle([1, 2, 3, 4, 5, 0])
        self._engine = table_engine(self.lm)
        self._allowed = threading.Semaphore(0)
        self.began: queue.Queue[int] = queue.Queue()
        self.failure: BaseException | None = None

    def start(self, request: Request) -> RequestRun:
        if UNKNOWN in request.prompt_ids:
            raise InvalidRequestError(f"token id {UNKNOWN} is unknown")
        return self._engine.start(request)

    def step(self, runs: Sequence[RequestRun]) -> list[StepOutput]:
        self.began.put(len(runs))
        assert self._allowed.acquire(timeout=SECONDS)
        if self.failure is not None:
            raise self.failure
        return self._engine.step(runs)

    def allow(self, steps: int) -> None:
        self._allowed.release(steps)

    @property
    def num_open(self) -> int:
        return sum(not sequence.closed for sequence in self.lm.sequences)


class Stage:
    """A loop, and what it said."""

    def __init__(self) -> None:
        self.engine = SteppedEngine()
        stand_in: Any = self.engine
        self.failures: queue.Queue[tuple[BaseException, str]] = queue.Queue()
        self.batch = RunningBatch(stand_in, 2)
        self.loop = EngineLoop(self.batch, self._failed)

    def _failed(self, error: BaseException) -> None:
        self.failures.put((error, threading.current_thread().name))

    def close(self) -> None:
        self.engine.allow(1000)
        self.loop.close()


class Brought(queue.Queue[list[StepEvent]]):
    """A call's events, step by step."""

    def next(self) -> list[StepEvent]:
        return self.get(timeout=SECONDS)


def thread_names() -> list[str]:
    return [each.name for each in threading.enumerate()]


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage()
    yield made
    made.close()
    assert "engine" not in thread_names()


def request(first: int, length: int) -> Request:
    """Goes on counting from ``first``, for so many tokens."""
    params = SamplingParams(seed=1, max_tokens=length, temperature=0.0)
    return Request(prompt_ids=np.array([first], np.int64), params=params)


def submit(stage: Stage, *requests: Request) -> tuple[Brought, Any]:
    brought = Brought()
    return brought, stage.loop.submit(requests, brought.put)


def tokens(events: Sequence[StepEvent]) -> list[tuple[int, list[int], bool]]:
    """Index, tokens and end of each event."""
    return [
        (each.index, each.output.token_ids if each.output else [], each.completion is not None)
        for each in events
    ]


def in_order(stage: Stage) -> None:
    """Returns when everything that was told before has been done."""
    done = threading.Event()
    stage.loop.order(done.set)
    assert done.wait(SECONDS)


def test_a_call_hears_of_its_requests_step_by_step(stage: Stage) -> None:
    stage.engine.allow(10)
    brought, _ = submit(stage, request(0, 2), request(3, 1))
    assert tokens(brought.next()) == [(0, [1], False), (1, [4], True)]
    (last,) = brought.next()
    assert tokens([last]) == [(0, [2], True)]
    assert last.completion is not None
    assert last.completion.token_ids == [1, 2]
    in_order(stage)
    assert (brought.empty(), stage.engine.num_open, stage.engine.began.qsize()) == (True, 0, 2)


def test_calls_share_steps_and_each_hears_of_its_own(stage: Stage) -> None:
    one, _ = submit(stage, request(0, 2))
    assert stage.engine.began.get(timeout=SECONDS) == 1
    other, _ = submit(stage, request(2, 1), request(4, 1))
    stage.engine.allow(3)
    assert tokens(one.next()) == [(0, [1], False)]
    assert tokens(one.next()) == [(0, [2], True)]
    # There is room for two: the third request joins when the first ones are done.
    assert tokens(other.next()) == [(0, [3], True)]
    assert tokens(other.next()) == [(1, [5], True)]
    assert [stage.engine.began.get(timeout=SECONDS) for _ in range(2)] == [2, 1]


def test_a_refused_request_has_an_error_and_its_call_goes_on(stage: Stage) -> None:
    stage.engine.allow(10)
    brought, _ = submit(stage, request(UNKNOWN, 1), request(0, 1))
    refused, served = brought.next()
    assert (refused.index, refused.output, refused.completion) == (0, None, None)
    assert isinstance(refused.error, InvalidRequestError)
    assert tokens([served]) == [(1, [1], True)]
    again, _ = submit(stage, request(1, 1))
    assert tokens(again.next()) == [(0, [2], True)]


def test_cancelling_drops_a_call_before_the_next_step_and_frees_it(stage: Stage) -> None:
    gone, call = submit(stage, request(0, 50), request(1, 50), request(2, 50))
    stays, _ = submit(stage, request(3, 2))
    assert stage.engine.began.get(timeout=SECONDS) == 2
    stage.loop.cancel(call)
    stage.engine.allow(1)
    assert len(gone.next()) == 2
    assert stage.engine.began.get(timeout=SECONDS) == 1
    assert stage.engine.num_open == 1
    stage.engine.allow(2)
    assert tokens(stays.next()) == [(0, [4], False)]
    assert tokens(stays.next()) == [(0, [5], True)]
    stage.loop.cancel(call)  # once more does no harm
    in_order(stage)
    assert (gone.empty(), stage.engine.num_open, stage.batch.room) == (True, 0, 2)


def test_cancelling_what_has_finished_or_not_begun(stage: Stage) -> None:
    stage.engine.allow(100)
    brought, call = submit(stage, request(0, 1))
    assert tokens(brought.next()) == [(0, [1], True)]
    stage.loop.cancel(call)
    blocked = threading.Event()

    def block() -> None:
        assert blocked.wait(SECONDS)

    stage.loop.order(block)
    never, call = submit(stage, request(0, 1))
    stage.loop.cancel(call)
    blocked.set()
    in_order(stage)
    assert never.empty()


def test_orders_are_carried_out_between_steps_on_the_engine_s_thread(stage: Stage) -> None:
    brought, _ = submit(stage, request(0, 3))
    assert stage.engine.began.get(timeout=SECONDS) == 1
    seen: list[tuple[str, int]] = []

    def look() -> None:
        seen.append((threading.current_thread().name, brought.qsize()))

    stage.loop.order(look)
    stage.loop.order(look)
    assert not seen
    stage.engine.allow(1)
    assert stage.engine.began.get(timeout=SECONDS) == 1
    # Both came after the first step and before the second.
    assert seen == [("engine", 1)] * 2


def test_orders_wake_a_loop_that_has_nothing_to_serve(stage: Stage) -> None:
    in_order(stage)
    assert stage.engine.began.empty()


def test_closing_waits_for_the_step_and_frees_everything() -> None:
    stage = Stage()
    brought, _ = submit(stage, request(0, 50))
    submit(stage, request(1, 50), request(2, 50))
    assert stage.engine.began.get(timeout=SECONDS) in (1, 2)
    closing = threading.Thread(target=stage.loop.close)
    closing.start()
    closing.join(0.02)
    assert closing.is_alive()
    stage.engine.allow(1)
    closing.join(SECONDS)
    assert not closing.is_alive()
    assert "engine" not in thread_names()
    assert (stage.engine.num_open, stage.batch.num_waiting, stage.batch.num_running) == (0, 0, 0)
    assert len(brought.next()) == 1
    assert brought.empty()
    assert stage.failures.empty()
    stage.loop.close()  # again


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("where", ["step", "order", "sink"])
def test_an_exception_ends_the_loop_and_is_told(where: str) -> None:
    stage = Stage()
    error = RuntimeError("out of memory")
    if where == "step":
        stage.engine.failure = error
    brought = Brought()

    def sink(events: list[StepEvent]) -> None:
        brought.put(events)
        if where == "sink":
            raise error

    stage.loop.submit([request(0, 50)], sink)
    assert stage.engine.began.get(timeout=SECONDS) == 1
    if where == "order":
        stage.loop.order(raising(error))
    stage.engine.allow(1)
    told, thread = stage.failures.get(timeout=SECONDS)
    assert (told, thread) == (error, "engine")
    assert until(lambda: "engine" not in thread_names())
    assert stage.engine.num_open == 0
    assert brought.qsize() == (0 if where == "step" else 1)
    stage.loop.close()
    assert stage.failures.empty()
