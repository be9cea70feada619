"""Who takes part in a step: seats, memory, priorities, shared prompts; and the rows of each."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.actors.scheduler import Scheduler, common_prefix, share_rows
from outrider.speculation.errors import InvalidRequestError, OutriderError
from outrider.speculation.types import IntArray


@dataclass
class Memory:
    """Tokens that there is room for."""

    size: int
    free: int = field(init=False)

    def __post_init__(self) -> None:
        self.free = self.size


@dataclass(eq=False)
class Job:
    """A request of a given text; ``advance`` is its step."""

    name: int
    text: IntArray
    memory: Memory
    priority: int = 0
    refusal: OutriderError | None = None
    num_cached: int = 0
    held: int = 0
    computes_all: bool = False
    began_with: list[int] = field(default_factory=list)

    @property
    def rank(self) -> tuple[int, int]:
        return self.priority, self.name

    @property
    def num_reusable(self) -> int:
        return 0 if self.computes_all else len(self.text) - 1

    def enter(self, like: tuple[Any, int] | None) -> bool:
        if self.refusal is not None:
            raise self.refusal
        if not self._take(len(self.text)):
            return False
        self.num_cached = 0 if like is None else min(like[1], len(self.text) - 1)
        self.began_with.append(self.num_cached)
        return True

    def leave(self) -> None:
        self.memory.free += self.held
        self.held = self.num_cached = 0

    def make_room(self) -> bool:
        return self._take(len(self.text) - self.held)

    def advance(self, count: int) -> None:
        self.num_cached += count
        if self.num_cached == len(self.text):
            self.text = np.append(self.text, self.name)

    def _take(self, count: int) -> bool:
        if count > self.memory.free:
            return False
        self.memory.free -= count
        self.held += count
        return True


def job(name: int, length: int, memory: Memory, *, first: int | None = None, priority: int = 0) -> Job:
    text = np.full(length, name if first is None else first)
    return Job(name, text, memory, priority=priority)


def names(jobs: list[Job]) -> list[int]:
    return [each.name for each in jobs]


def scheduler_of(jobs: list[Job], seats: int) -> Scheduler[Job]:
    scheduler: Scheduler[Job] = Scheduler(seats)
    for each in jobs:
        scheduler.add(each)
    return scheduler


def step(scheduler: Scheduler[Job], max_rows: int = 1000) -> None:
    assert scheduler.next_step() == []
    running = list(scheduler.running)
    shares = share_rows([len(each.text) - each.num_cached for each in running], max_rows)
    for each, count in zip(running, shares, strict=True):
        each.advance(count)


def test_priority_goes_before_arrival() -> None:
    memory = Memory(1000)
    jobs = [
        job(0, 5, memory, priority=1),
        job(1, 5, memory),
        job(2, 5, memory, priority=-1),
        job(3, 5, memory),
    ]
    scheduler = scheduler_of(jobs, 2)
    scheduler.next_step()
    assert names(scheduler.running) == [2, 1]
    assert names(scheduler.waiting) == [3, 0]


def test_who_is_more_urgent_takes_a_seat_and_who_came_later_does_not() -> None:
    memory = Memory(1000)
    scheduler = scheduler_of([job(0, 5, memory, priority=1), job(1, 5, memory)], 2)
    step(scheduler)
    scheduler.add(job(2, 5, memory, priority=1))
    step(scheduler)
    assert names(scheduler.running) == [1, 0]
    scheduler.add(job(3, 5, memory))
    step(scheduler)
    assert names(scheduler.running) == [1, 3]
    assert names(scheduler.waiting) == [0, 2]
    assert scheduler.num_preemptions == 1


def test_memory_bounds_admission_and_nobody_overtakes() -> None:
    memory = Memory(20)
    scheduler = scheduler_of([job(0, 8, memory), job(1, 15, memory), job(2, 1, memory)], 8)
    step(scheduler)
    assert names(scheduler.running) == [0]
    assert names(scheduler.waiting) == [1, 2]


def test_the_least_urgent_leaves_when_memory_runs_out_and_comes_back() -> None:
    memory = Memory(20)
    jobs = [job(0, 8, memory), job(1, 9, memory)]
    scheduler = scheduler_of(jobs, 8)
    while not scheduler.num_preemptions:
        step(scheduler)
    assert names(scheduler.running) == [0]
    assert names(scheduler.waiting) == [1]
    assert len(jobs[1].text) > 9, "it keeps its text"
    step(scheduler)
    assert names(scheduler.running) == [0], "it would only have to leave again"
    scheduler.remove(jobs[0])
    jobs[0].leave()
    step(scheduler)
    assert names(scheduler.running) == [1]


def test_who_cannot_be_served_is_refused_and_the_others_go_on() -> None:
    memory = Memory(100)
    jobs = [job(0, 5, memory), job(1, 5, memory)]
    jobs[0].refusal = InvalidRequestError("no")
    scheduler = scheduler_of(jobs, 1)
    assert scheduler.next_step() == [(jobs[0], jobs[0].refusal)]
    assert (names(scheduler.running), names(scheduler.waiting)) == ([1], [])


def test_one_prompt_is_computed_once() -> None:
    """Choices of one prompt wait for the first one's, then begin with all but its last token."""
    memory = Memory(10_000)
    jobs = [job(name, 300, memory, first=7) for name in range(4)] + [job(9, 10, memory)]
    scheduler = scheduler_of(jobs, 8)
    step(scheduler, 64)
    assert names(scheduler.running) == [0, 9], "another prompt does not wait"
    while jobs[0].num_cached < 299:
        assert len(scheduler.running) == 2
        step(scheduler, 64)
    step(scheduler, 64)
    assert names(scheduler.running) == [0, 1, 2, 3, 9]
    assert [each.began_with for each in jobs] == [[0], [299], [299], [299], [0]]


def test_who_computes_its_whole_text_waits_for_nobody() -> None:
    memory = Memory(1000)
    jobs = [job(name, 200, memory, first=7) for name in range(2)]
    jobs[1].computes_all = True
    scheduler = scheduler_of(jobs, 8)
    step(scheduler, 64)
    assert names(scheduler.running) == [0, 1]
    late = job(2, 200, memory, first=7)
    late.computes_all = True
    scheduler.add(late)
    step(scheduler, 64)
    assert [each.began_with for each in (*jobs, late)] == [[0], [0], [0]]


def test_little_in_common_is_not_waited_for_but_used() -> None:
    memory = Memory(1000)
    one, other = job(0, 200, memory), job(1, 200, memory)
    other.text[:7] = one.text[:7]
    scheduler = scheduler_of([one, other], 8)
    step(scheduler, 64)
    assert other.began_with == [0]
    late = job(2, 200, memory)
    late.text[:7] = one.text[:7]
    scheduler.add(late)
    step(scheduler, 64)
    assert late.began_with == [7]


def test_nobody_leaves_a_seat_for_someone_who_waits_for_a_prompt() -> None:
    memory = Memory(1000)
    jobs = [job(0, 200, memory, first=7, priority=-1), job(1, 5, memory)]
    scheduler = scheduler_of(jobs, 2)
    step(scheduler, 64)
    scheduler.add(job(2, 200, memory, first=7, priority=-1))
    step(scheduler, 64)
    assert names(scheduler.running) == [0, 1]
    assert scheduler.num_preemptions == 0


def test_what_a_request_waited_for_may_leave() -> None:
    memory = Memory(1000)
    jobs = [job(0, 200, memory, first=7), job(1, 200, memory, first=7)]
    scheduler = scheduler_of(jobs, 8)
    step(scheduler, 64)
    assert names(scheduler.waiting) == [1]
    scheduler.remove(jobs[0])
    step(scheduler, 64)
    assert names(scheduler.running) == [1]


@pytest.mark.parametrize(
    ("left", "right", "shared"),
    [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 9, 3], 1), ([5], [6], 0), ([4, 4], [4, 4], 2)],
)
def test_common_prefix(left: list[int], right: list[int], shared: int) -> None:
    assert common_prefix(np.array(left, np.int64), np.array(right, np.int64)) == shared


def test_prompts_share_what_decoding_leaves() -> None:
    assert share_rows([1], 64) == [1]
    assert share_rows([100], 64) == [64]
    assert share_rows([100, 5], 64) == [59, 5], "a short prompt does not wait for a long one"
    assert share_rows([100, 100], 64) == [32, 32]
    assert share_rows([1, 100, 1], 64) == [1, 31, 1], "half of the rest, while others decode"
    assert share_rows([1] * 64, 64) == [1] * 64


@given(st.lists(st.integers(1, 200), min_size=1, max_size=64), st.integers(0, 100))
def test_shares_fit_and_everyone_gets_on(pending: list[int], more: int) -> None:
    max_rows = len(pending) + more
    shares = share_rows(pending, max_rows)
    assert sum(shares) <= max_rows
    assert all(1 <= share <= count for share, count in zip(shares, pending, strict=True))
    if 1 not in pending:
        assert sum(shares) == min(sum(pending), max_rows), "no row is left empty"
    order = np.argsort(pending, kind="stable")
    assert (np.diff(np.array(shares)[order]) >= 0).all(), "who has more to do gets no less"


@settings(derandomize=True, deadline=None, database=None)
@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 10), st.integers(-1, 1)), min_size=1, max_size=8),
)
def test_everyone_comes_to_an_end(seats: int, wanted: list[tuple[int, int, int]]) -> None:
    """However little memory there is beyond the largest text."""
    memory = Memory(max(length + tokens for length, tokens, _ in wanted))
    jobs = [job(name, length, memory, priority=priority) for name, (length, _, priority) in enumerate(wanted)]
    ends = [length + tokens for length, tokens, _ in wanted]
    scheduler = scheduler_of(jobs, seats)
    for _ in range(2000):
        step(scheduler, 16)
        assert len(scheduler.running) <= seats
        for each in list(scheduler.running):
            if len(each.text) >= ends[each.name]:
                scheduler.remove(each)
                each.leave()
        if not scheduler.running and not scheduler.waiting:
            break
    assert memory.free == memory.size
    assert [len(each.text) for each in jobs] == ends
