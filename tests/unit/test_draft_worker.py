"""The draft worker's rules, message by message."""

from typing import Any

import numpy as np
import pytest
from instruments.remote import hello_for
from instruments.table_drafts import TableDraftEngine
from instruments.table_lm import TableLM

from outrider.actors import draft_worker, wire
from outrider.actors.draft_worker import IDLE_SECONDS, MAX_TOMBSTONES, DraftWorker
from outrider.actors.virtual import BusyTime, VirtualClock
from outrider.speculation.errors import InvalidRequestError
from outrider.speculation.replication.messages import (
    MAX_GROWTH_NODES,
    NO_LIMIT,
    Close,
    Commit,
    DrafterMessage,
    Growth,
    GrowthLimits,
    Lost,
    Open,
    TargetMessage,
)
from outrider.speculation.replication.text import CommittedText
from outrider.speculation.sampling_params import SamplingParams

PROMPT = [1, 2, 3]


class Peer:
    """A target that keeps what it is sent, as the wire gives it."""

    def __init__(self) -> None:
        self.sent: list[DrafterMessage] = []

    def send(self, message: DrafterMessage) -> None:
        self.sent.append(wire.decode_drafter(wire.encode_drafter(message)))

    def take(self) -> list[DrafterMessage]:
        sent, self.sent = self.sent, []
        return sent


class Bench:
    """One worker and one target, message by message."""

    def __init__(self, *, vocab_size: int = 5, **engine: Any) -> None:
        self.world = VirtualClock()
        self.busy = BusyTime(self.world)
        lm = TableLM.random(3, vocab_size=vocab_size)
        self.engine = TableDraftEngine(lm, self.busy, 0.01, **engine)
        self.worker = DraftWorker(self.engine, clock=self.busy)
        self.peer = Peer()
        self.worker.joined(self.peer, hello_for(vocab_size))
        self.text = CommittedText(np.array(PROMPT))

    def tell(self, *messages: TargetMessage) -> list[DrafterMessage]:
        """What the worker answers at once, without a step."""
        for message in messages:
            self.worker.message(self.peer, message)
        return self.peer.take()

    def steps(self, count: int = 100) -> list[Growth]:
        """What it says in so many steps, or until it has nothing to do."""
        for _ in range(count):
            if not self.worker.step():
                break
        said = self.peer.take()
        assert all(isinstance(each, Growth) for each in said)
        return [each for each in said if isinstance(each, Growth)]

    def commit(self, sequence: int, tokens: list[int], *, generation: int = 1, steps: int = 2) -> Commit:
        """The next commit, were all before it heard."""
        base, ids = self.text.length, np.array(tokens, np.int64)
        self.text.append(ids)
        return Commit(
            session=1, generation=generation, sequence=sequence, base_length=base, tokens=ids,
            prefix_hash=self.text.prefix_hash, steps=steps,
        )  # fmt: skip


def opening(*, session: int = 1, generation: int = 1, steps: int = 2, **limits: Any) -> Open:
    values = {"width": 4, "children": 2, "steps": steps, "min_score": 0.0} | limits
    return Open(
        session=session, generation=generation, token_ids=np.array(PROMPT), prompt_length=3,
        params=SamplingParams(temperature=0.0, seed=0), choice=0, limits=GrowthLimits(**values),
    )  # fmt: skip


def close(generation: int = 1, session: int = 1) -> Close:
    return Close(session=session, generation=generation)


def lost(generation: int = 1) -> list[Lost]:
    return [Lost(session=1, generation=generation)]


def test_a_session_takes_its_steps_and_says_when_it_has() -> None:
    bench = Bench()
    assert bench.tell(opening(steps=3)) == []
    growths = bench.steps()
    assert [each.final for each in growths] == [False, False, True]
    assert [each.first_id for each in growths] == [1, 3, 7]
    assert {(each.seen_commit, each.base_length) for each in growths} == {(0, 3)}
    assert [each.draft_steps for each in growths] == [1, 1, 1]
    assert sum(each.draft_seconds for each in growths) == pytest.approx(0.03)
    assert bench.tell(bench.commit(1, [4], steps=1)) == []
    (growth,) = bench.steps()
    assert (growth.seen_commit, growth.base_length, growth.final) == (1, 4, True)


def test_without_a_limit_it_grows_until_nothing_is_worth_it() -> None:
    bench = Bench()
    bench.tell(opening(steps=NO_LIMIT, min_score=0.05))
    growths = bench.steps()
    assert [each.final for each in growths] == [*[False] * (len(growths) - 1), True]
    assert len(growths) > 2
    assert bench.steps() == [], "it says twice that it has finished"


def test_no_steps_are_answered_at_once() -> None:
    bench = Bench()
    bench.tell(opening(steps=0))
    (growth,) = bench.steps()
    assert growth.final
    assert len(growth.tokens) == growth.draft_steps == 0


def test_a_missing_commit_is_told() -> None:
    bench = Bench()
    bench.tell(opening())
    first, second = bench.commit(1, [4]), bench.commit(2, [1])
    assert bench.tell(second) == lost()
    assert bench.worker.num_sessions == 0
    assert bench.engine.sessions[0].closed
    assert bench.tell(first) == lost(), "what is not opened is told once more, and does no harm"


@pytest.mark.parametrize("change", [{"base_length": 5}, {"prefix_hash": 1}])
def test_texts_that_came_apart_are_told(change: dict[str, int]) -> None:
    bench = Bench()
    bench.tell(opening())
    commit = bench.commit(1, [4])
    values = {name: getattr(commit, name) for name in Commit.__dataclass_fields__}
    assert bench.tell(Commit(**{**values, **change})) == lost()


def test_duplicates_change_nothing() -> None:
    bench = Bench()
    bench.tell(opening())
    bench.steps()
    commit = bench.commit(1, [4])
    bench.tell(commit, commit, opening())
    growths = bench.steps()
    assert {each.seen_commit for each in growths} == {1}
    assert bench.tell(commit) == []
    assert bench.steps() == []
    assert len(bench.engine.sessions) == bench.worker.num_sessions == 1


def test_a_commit_before_its_open_is_told() -> None:
    bench = Bench()
    assert bench.tell(bench.commit(1, [4])) == lost()


def test_an_old_generation_is_ignored() -> None:
    bench = Bench()
    bench.tell(opening(generation=3))
    assert bench.tell(opening(generation=2), bench.commit(1, [4], generation=2), close(2)) == []
    assert bench.worker.num_sessions == 1
    assert {each.generation for each in bench.steps()} == {3}


def test_a_new_generation_takes_the_old_one_s_place() -> None:
    bench = Bench()
    bench.tell(opening(), opening(generation=2))
    assert bench.worker.num_sessions == 1
    assert [session.closed for session in bench.engine.sessions] == [True, False]
    assert {(each.generation, each.first_id) for each in bench.steps(1)} == {(2, 1)}


def test_a_commit_of_a_generation_that_was_never_opened_is_told() -> None:
    bench = Bench()
    bench.tell(opening())
    assert bench.tell(bench.commit(1, [4], generation=2)) == lost(2)
    assert bench.worker.num_sessions == 0


def test_an_open_after_its_close_opens_nothing() -> None:
    bench = Bench()
    assert bench.tell(close(2), opening(generation=2), opening(generation=1)) == []
    assert bench.worker.num_sessions == 0
    assert bench.tell(bench.commit(1, [4], generation=2)) == [], "a closed generation is not lost"


def test_what_was_closed_may_be_opened_anew_and_is_followed() -> None:
    """As after an overflow: the same session, at the same worker, in its next generation."""
    bench = Bench()
    bench.tell(opening(), close(1), opening(generation=2))
    bench.steps()
    assert bench.tell(bench.commit(1, [4], generation=2)) == []
    growths = bench.steps()
    assert growths
    assert {(each.generation, each.seen_commit) for each in growths} == {(2, 1)}
    assert bench.tell(bench.commit(1, [4], generation=3)) == lost(3), "a lost Open is noticed"


def test_tombstones_are_bounded() -> None:
    bench = Bench()
    bench.tell(*(close(session=number) for number in range(MAX_TOMBSTONES + 50)))
    (target,) = bench.worker._targets.values()
    assert len(target.closed) == MAX_TOMBSTONES
    assert bench.tell(opening(session=MAX_TOMBSTONES + 49)) == []
    assert bench.worker.num_sessions == 0


def test_a_session_that_nobody_speaks_for_expires() -> None:
    bench = Bench()
    bench.tell(opening(), opening(session=2))
    bench.steps()
    bench.world.advance(IDLE_SECONDS - 1)
    bench.tell(bench.commit(1, [4]))
    bench.world.advance(2.0)
    bench.steps()
    assert [session.closed for session in bench.engine.sessions] == [False, True]
    bench.world.advance(IDLE_SECONDS)
    bench.worker.step()
    assert bench.worker.num_sessions == 0


def test_a_target_that_leaves_takes_its_sessions_along() -> None:
    bench = Bench()
    other = Peer()
    bench.worker.joined(other, hello_for(5))
    bench.tell(opening(), opening(session=2))
    bench.worker.message(other, opening())
    bench.worker.left(bench.peer)
    assert bench.worker.num_sessions == 1
    assert bench.tell(opening(session=3)) == []
    assert bench.worker.num_sessions == 1
    bench.worker.left(bench.peer)


def test_no_room_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()

    def refuse(*_: object, **__: object) -> None:
        raise InvalidRequestError("no room")

    monkeypatch.setattr(bench.engine, "open_session", refuse)
    (answer,) = bench.tell(opening())
    assert isinstance(answer, Lost)
    assert answer.reason == "no room"


def test_more_growth_than_fits_a_message_goes_in_several() -> None:
    """A wide tree: one step yields more nodes than the wire takes in one message."""
    bench = Bench(vocab_size=200, capacity=2000)
    bench.tell(opening(steps=2, width=16, children=64))
    growths = bench.steps()
    assert sum(len(each.tokens) for each in growths) > 3 * MAX_GROWTH_NODES
    assert max(len(each.tokens) for each in growths) <= MAX_GROWTH_NODES
    assert [each.final for each in growths] == [*[False] * (len(growths) - 1), True]
    firsts = np.cumsum([1, *(len(each.tokens) for each in growths)])[:-1]
    assert [each.first_id for each in growths] == firsts.tolist()
    assert sum(each.draft_steps for each in growths) == 2


def test_steps_that_yield_nothing_are_reported_with_the_next_growth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A long text is taken in by several forwards, of which only the last one yields nodes."""
    bench = Bench()
    bench.tell(opening(steps=5))
    grow = bench.engine.grow
    monkeypatch.setattr(bench.engine, "grow", lambda _: bench.busy.spend(0.01))
    bench.worker.step()
    bench.worker.step()
    assert bench.peer.take() == []
    monkeypatch.setattr(bench.engine, "grow", grow)
    (growth,) = bench.steps(1)
    assert growth.draft_steps == 3
    assert growth.draft_seconds == pytest.approx(0.03)


def test_one_step_serves_all_sessions_by_score(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.tell(opening(steps=NO_LIMIT), opening(session=2, steps=NO_LIMIT))
    bench.steps(1)
    sizes: list[int] = []
    grow = bench.engine.grow

    def counted(plan: Any) -> None:
        sizes.append(sum(len(slots) for _, slots in plan))
        grow(plan)

    monkeypatch.setattr(bench.engine, "grow", counted)
    bench.steps(10)
    assert max(sizes) <= draft_worker.MAX_STEP_NODES
    assert bench.worker.statistics.draft_steps == 11
