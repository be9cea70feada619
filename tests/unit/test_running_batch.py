"""Requests join and leave an engine's steps; what they hold is freed however they end."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instruments.serving import table_engine
from instruments.table_lm import TableLM

from outrider.actors.request_run import RequestRun
from outrider.actors.running_batch import RunningBatch, Ticket
from outrider.speculation.errors import InvalidRequestError, ModelError
from outrider.speculation.request import Request, StepOutput
from outrider.speculation.sampling_params import SamplingParams

BROKEN = 6
"""After this token the model gives no numbers."""
UNKNOWN = 99
"""A token that the engine refuses."""


class Watched:
    """An engine, and the requests of each of its steps by the first token of their prompts."""

    def __init__(self) -> None:
        self.lm = TableLM.cycle([1, 2, 3, 4, 5, 0, 0])
        self.lm.logits[BROKEN] = np.nan
        self._engine = table_engine(self.lm)
        self._names: dict[RequestRun, int] = {}
        self.steps: list[list[int]] = []

    def start(self, request: Request) -> RequestRun:
        if UNKNOWN in request.prompt_ids:
            raise InvalidRequestError(f"token id {UNKNOWN} is unknown")
        run = self._engine.start(request)
        self._names[run] = int(request.prompt_ids[0])
        return run

    def step(self, runs: Sequence[RequestRun]) -> list[StepOutput]:
        self.steps.append([self._names[run] for run in runs])
        return self._engine.step(runs)

    @property
    def num_open(self) -> int:
        return sum(not sequence.closed for sequence in self.lm.sequences)


def batch_of(engine: Watched, size: int) -> RunningBatch:
    stand_in: Any = engine
    return RunningBatch(stand_in, size)


def request(first: int, length: int) -> Request:
    """Goes on counting from ``first``, for so many tokens."""
    params = SamplingParams(seed=1, max_tokens=length, temperature=0.0)
    return Request(prompt_ids=np.array([first], np.int64), params=params)


def run_to_end(batch: RunningBatch) -> list[Ticket]:
    """Finished tickets in their order."""
    done = []
    while batch.num_running or batch.num_waiting:
        done += [ticket for ticket, _ in batch.step() if ticket.finished]
    return done


def tokens_of(ticket: Ticket) -> list[int]:
    assert ticket.completion is not None
    return ticket.completion.token_ids


def test_who_finishes_makes_room_for_the_next_in_line() -> None:
    engine = Watched()
    batch = batch_of(engine, 2)
    tickets = [batch.submit(request(first, length)) for first, length in ((0, 3), (1, 1), (2, 1), (3, 2))]
    assert (batch.num_running, batch.num_waiting, batch.room) == (0, 4, -2)
    assert run_to_end(batch) == [tickets[1], tickets[2], tickets[0], tickets[3]]
    assert engine.steps == [[0, 1], [0, 2], [0, 3], [3]]
    assert [tokens_of(each) for each in tickets] == [[1, 2, 3], [2], [3], [4, 5]]
    assert [each.completion.text for each in tickets if each.completion] == ["bcd", "c", "d", "ef"]
    assert (batch.num_running, batch.num_waiting, batch.room, engine.num_open) == (0, 0, 2, 0)


def test_requests_join_between_two_steps() -> None:
    engine = Watched()
    batch = batch_of(engine, 8)
    batch.submit(request(0, 3))
    batch.step()
    late = batch.submit(request(2, 1))
    assert [(ticket is late, output is not None) for ticket, output in batch.step()] == [
        (False, True),
        (True, True),
    ]
    assert late.finished
    batch.step()
    assert engine.steps == [[0], [0, 2], [0]]


def test_a_step_without_requests_asks_nothing_of_the_engine() -> None:
    engine = Watched()
    assert batch_of(engine, 2).step() == []
    assert engine.steps == []


def test_what_was_refused_has_an_error_and_the_others_are_served() -> None:
    engine = Watched()
    batch = batch_of(engine, 1)
    bad = [batch.submit(request(UNKNOWN, 1)) for _ in range(2)]
    good = batch.submit(request(0, 1))
    brought = batch.step()
    assert [ticket for ticket, _ in brought] == [*bad, good]
    assert [output is None for _, output in brought] == [True, True, False]
    assert all(isinstance(each.error, InvalidRequestError) and each.completion is None for each in bad)
    assert tokens_of(good) == [1]
    assert engine.num_open == 0


def test_only_refusals() -> None:
    engine = Watched()
    batch = batch_of(engine, 2)
    ticket = batch.submit(request(UNKNOWN, 1))
    assert batch.step() == [(ticket, None)]
    assert (ticket.finished, engine.steps, batch.room) == (True, [], 2)


def test_a_request_that_the_model_fails_leaves_the_others_alone() -> None:
    engine = Watched()
    batch = batch_of(engine, 2)
    bad, good = batch.submit(request(BROKEN, 2)), batch.submit(request(0, 2))
    assert run_to_end(batch) == [bad, good]
    assert isinstance(bad.error, ModelError)
    assert tokens_of(good) == [1, 2]
    assert engine.num_open == 0


def test_cancelling_frees_at_once() -> None:
    engine = Watched()
    batch = batch_of(engine, 2)
    tickets = [batch.submit(request(first, 5)) for first in range(4)]
    batch.step()
    assert engine.num_open == 2
    batch.cancel(tickets[0])
    batch.cancel(tickets[2])
    assert (engine.num_open, batch.num_running, batch.num_waiting) == (1, 1, 1)
    batch.cancel(tickets[0])  # once more does no harm
    assert run_to_end(batch) == [tickets[1], tickets[3]]
    batch.cancel(tickets[1])  # nor does it after the end
    assert engine.steps[:2] == [[0, 1], [1, 3]]
    assert not tickets[0].finished
    assert not tickets[2].finished
    assert engine.num_open == 0


def test_closing_frees_everything() -> None:
    engine = Watched()
    batch = batch_of(engine, 2)
    for first in range(3):
        batch.submit(request(first, 5))
    batch.step()
    batch.close()
    assert (engine.num_open, batch.num_running, batch.num_waiting) == (0, 0, 0)
    assert batch.step() == []


@pytest.mark.parametrize("failing", ["start", "step"])
def test_after_an_exception_of_another_kind_closing_still_frees(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("out of memory")

    engine = Watched()
    batch = batch_of(engine, 2)
    batch.submit(request(0, 5))
    batch.step()
    batch.submit(request(1, 5))
    monkeypatch.setattr(engine, failing, fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        batch.step()
    batch.close()
    assert engine.num_open == 0


@settings(derandomize=True, deadline=None, database=None)
@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(0, 8)), max_size=10),
    st.sets(st.tuples(st.integers(0, 9), st.integers(0, 10)), max_size=4),
)
def test_any_arrivals_and_cancellations(
    size: int, arrivals: list[tuple[int, int, int]], cancellations: set[tuple[int, int]]
) -> None:
    """Each gets its own tokens, is first served in the order of arrival, and holds nothing afterwards."""
    engine = Watched()
    batch = batch_of(engine, size)
    tickets: dict[int, Ticket] = {}
    cancelled: set[int] = set()
    served: list[int] = []
    for step in range(80):
        for number, (first, length, when) in enumerate(arrivals):
            if when == step:
                tickets[number] = batch.submit(request(first, length))
        for number, when in cancellations:
            if when == step and number in tickets and not tickets[number].finished:
                batch.cancel(tickets[number])
                cancelled.add(number)
        names = {ticket: number for number, ticket in tickets.items()}
        brought = [names[ticket] for ticket, _ in batch.step()]
        assert len(brought) <= size
        assert not cancelled & set(brought)
        served += [number for number in brought if number not in served]
    order = sorted(range(len(arrivals)), key=lambda number: (arrivals[number][2], number))
    assert served == [number for number in order if number in served]
    for number, (first, length, _) in enumerate(arrivals):
        if number not in cancelled:
            assert tokens_of(tickets[number]) == [(first + 1 + each) % 6 for each in range(length)]
    assert (engine.num_open, batch.num_running, batch.num_waiting) == (0, 0, 0)
