"""Who drafts for whom: rooms, failures, silence and patience."""

import numpy as np
import pytest
from instruments.remote import welcome_of

from outrider.actors import wire
from outrider.actors.draft_pool import AVOIDED_SECONDS, DraftPool
from outrider.actors.feed import FIRST_BACKOFF, MAX_BACKOFF, SILENCE
from outrider.actors.remote_session import RemoteSession
from outrider.actors.transport import Disconnected, DraftChannel, Overflowed, Received
from outrider.actors.virtual import VirtualClock
from outrider.speculation.replication.messages import (
    NO_LIMIT,
    Close,
    Commit,
    Growth,
    GrowthLimits,
    Lost,
    Open,
    TargetMessage,
)
from outrider.speculation.request import Request
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.statistics import SpeculationStatistics

VOCAB = 9
LIMITS = GrowthLimits(width=4, children=4, steps=NO_LIMIT, min_score=0.0)


class Channel:
    """One worker's, by hand; it notes what it is sent."""

    def __init__(self, name: str, max_sessions: int) -> None:
        self.address = name
        self.sent: list[TargetMessage] = []
        self._max_sessions = max_sessions
        self._inbox: list[Received] = []
        self.welcome()

    def welcome(self) -> None:
        self._inbox.append(Received(welcome_of(self.address, VOCAB, self._max_sessions), 0))

    def say(self, message: Growth | Lost | Disconnected | Overflowed) -> None:
        self._inbox.append(Received(message, 1))

    def send(self, message: TargetMessage) -> int:
        self.sent.append(wire.decode_target(wire.encode_target(message)))
        return 1

    def receive(self) -> list[Received]:
        arrived, self._inbox = self._inbox, []
        return arrived

    def close(self) -> None:
        self.sent = []

    @property
    def opened(self) -> list[tuple[int, int]]:
        """Sessions and generations."""
        return [(each.session, each.generation) for each in self.sent if isinstance(each, Open)]


class Nothing:
    """``Arrivals`` of nothing: waiting lets time pass."""

    def __init__(self, world: VirtualClock) -> None:
        self._world = world

    def wait(self, seconds: float) -> None:
        self._world.advance(seconds)


class Bench:
    def __init__(self, *rooms: int, per_request: int = 1) -> None:
        self.world = VirtualClock()
        self.channels = [Channel(f"w{index}", room) for index, room in enumerate(rooms)]
        self.pool = DraftPool(
            self.channels, Nothing(self.world), limits=lambda _: LIMITS, vocab_size=VOCAB, clock=self.world,
            num_drafters=lambda _: per_request,
        )  # fmt: skip
        self.pool.poll()

    def open(self) -> RemoteSession:
        params = SamplingParams(temperature=0.0, seed=0)
        return self.pool.open(Request(prompt_ids=np.array([1, 2, 3]), params=params), SpeculationStatistics())

    def later(self, seconds: float) -> None:
        self.world.advance(seconds)
        self.pool.poll()


def growth(
    session: RemoteSession, *, first_id: int = 1, seen: int = 0, generation: int = 1, length: int = 3
) -> Growth:
    return Growth(
        session=session.number, generation=generation, seen_commit=seen, base_length=length,
        first_id=first_id, parents=np.zeros(1, np.int64), tokens=np.array([4]),
        scores=np.ones(1, np.float32),
    )  # fmt: skip


def place(session: RemoteSession) -> DraftChannel | None:
    """Where its only drafter is."""
    (feed,) = session.all_feeds
    return feed.channel


def test_requests_go_where_the_fewest_are() -> None:
    bench = Bench(4, 4)
    for _ in range(4):
        bench.open()
    assert [channel.opened for channel in bench.channels] == [[(1, 1), (3, 1)], [(2, 1), (4, 1)]]
    assert bench.pool.num_sessions == 4


def test_a_full_worker_gets_no_more() -> None:
    bench = Bench(2, 1)
    sessions = [bench.open() for _ in range(5)]
    assert [len(channel.opened) for channel in bench.channels] == [2, 1]
    assert [session.reachable for session in sessions] == [True, True, True, False, False]
    sessions[1].close()
    bench.pool.poll()
    assert bench.channels[1].opened == [(2, 1), (4, 1)]
    sessions[0].close()
    sessions[2].close()
    sessions[4].close()
    bench.pool.poll()
    assert bench.pool.num_sessions == 1


def test_a_request_takes_the_room_of_one_that_has_just_ended() -> None:
    """At once: there may be no step before the next request begins."""
    bench = Bench(1)
    bench.open().close()
    assert bench.open().reachable
    assert bench.pool.num_sessions == 1


def test_requests_wait_for_a_worker_and_forget_those_that_ended() -> None:
    bench = Bench()
    sessions = [bench.open() for _ in range(3)]
    sessions[1].close()
    bench.pool.poll()
    assert bench.pool.num_connected == bench.pool.num_sessions == 0
    assert len(bench.pool._homeless) == 2


def test_failover_prefers_a_worker_that_did_not_fail() -> None:
    bench = Bench(8, 8, 8)
    session = bench.open()
    # The others are busier than the one that fails.
    others = [bench.open() for _ in range(5)]
    assert place(session) is bench.channels[0]
    others[2].close()
    bench.channels[0].say(Lost(session=session.number, generation=1))
    bench.pool.poll()
    bench.later(FIRST_BACKOFF + 0.001)
    assert place(session) in bench.channels[1:]
    assert (session.stats.generations, session.stats.drafter_failovers) == (2, 1)
    new = bench.open()
    assert place(new) is not bench.channels[0]
    bench.later(AVOIDED_SECONDS)
    assert place(bench.open()) is bench.channels[0]


def test_a_worker_that_is_the_only_one_is_tried_again() -> None:
    bench = Bench(8)
    session = bench.open()
    bench.channels[0].say(Lost(session=1, generation=1))
    bench.pool.poll()
    assert not session.reachable
    bench.later(FIRST_BACKOFF + 0.001)
    assert session.reachable
    assert bench.channels[0].opened == [(1, 1), (1, 2)]
    assert session.stats.drafter_failovers == 0


def test_the_pauses_double_until_a_commit_was_seen() -> None:
    bench = Bench(8)
    session = bench.open()
    pauses = []
    for generation in range(1, 11):
        bench.channels[0].say(Lost(session=1, generation=generation))
        bench.pool.poll()
        pauses.append(session.all_feeds[0].retry_at - bench.world.now)
        bench.later(pauses[-1] + 0.001)
    assert pauses == pytest.approx([min(MAX_BACKOFF, FIRST_BACKOFF * 2**count) for count in range(10)])
    bench.channels[0].say(growth(session, generation=11))
    bench.pool.poll()
    session.commit(np.array([4]))
    bench.channels[0].say(growth(session, generation=11, first_id=2, seen=1, length=4))
    bench.channels[0].say(Lost(session=1, generation=11))
    bench.pool.poll()
    bench.pool.poll()
    pause = session.all_feeds[0].retry_at - bench.world.now
    assert pause in (pytest.approx(FIRST_BACKOFF), pytest.approx(MAX_BACKOFF))


def test_silence_ends_a_generation() -> None:
    """Nothing was heard of the text, or of a commit; of a drafter that is done, nothing need be."""
    bench = Bench(8)
    session = bench.open()
    limit = SILENCE + 10 * FIRST_BACKOFF
    bench.later(limit - 0.01)
    assert session.reachable
    bench.channels[0].say(growth(session))
    bench.pool.poll()
    bench.later(100.0)
    assert session.reachable, "it has said all there is to say"
    session.commit(np.array([4]))
    bench.later(limit - 0.01)
    session.commit(np.array([4]))
    assert session.reachable
    bench.later(0.02)
    assert not session.reachable
    assert isinstance(bench.channels[0].sent[-1], Close)


def test_a_drafter_that_is_always_one_commit_behind_is_not_silent() -> None:
    bench = Bench(8)
    session = bench.open()
    bench.channels[0].say(growth(session))
    bench.pool.poll()
    for sequence in range(1, 12):
        session.commit(np.array([4]))
        bench.channels[0].say(growth(session, first_id=sequence + 1, seen=sequence - 1, length=2 + sequence))
        bench.later(0.5)
    assert session.reachable
    assert session.stats.generations == 1


def test_what_is_of_another_generation_or_nobody_s_is_counted_or_dropped() -> None:
    bench = Bench(8)
    session = bench.open()
    stranger = Growth(
        session=77, generation=1, seen_commit=0, base_length=3, first_id=1, parents=np.zeros(1, np.int64),
        tokens=np.array([4]), scores=np.ones(1, np.float32),
    )  # fmt: skip
    for message in (growth(session, generation=2), stranger, Lost(session=1, generation=2)):
        bench.channels[0].say(message)
    bench.pool.poll()
    assert session.reachable
    assert len(session.tree) == 0
    assert (session.stats.stale_messages, session.stats.stale_nodes) == (1, 1)
    bench.channels[0].say(growth(session))
    bench.pool.poll()
    assert len(session.tree) == 1


def test_an_overflow_ends_all_generations_of_a_worker() -> None:
    bench = Bench(8)
    sessions = [bench.open(), bench.open()]
    bench.channels[0].say(growth(sessions[0]))
    bench.channels[0].say(Overflowed())
    bench.pool.poll()
    assert not any(session.reachable for session in sessions)
    assert bench.pool.num_connected == 1
    bench.later(FIRST_BACKOFF + 0.001)
    assert all(session.reachable for session in sessions)


def test_a_stream_that_breaks_and_comes_back_in_one_go() -> None:
    """The tree outlives the generation, and the new one knows the whole text."""
    bench = Bench(8)
    session = bench.open()
    bench.channels[0].say(growth(session))
    bench.pool.poll()
    bench.channels[0].say(Disconnected("gone"))
    bench.channels[0].welcome()
    session.commit(np.array([7, 4]))
    session.tree.add([-1], [5], [0.5])
    bench.pool.poll()
    assert session.reachable
    assert len(session.tree) == 1
    last = bench.channels[0].sent[-1]
    assert isinstance(last, Open)
    assert last.token_ids.tolist() == [1, 2, 3, 7, 4]
    session.commit(np.array([5]))
    last = bench.channels[0].sent[-1]
    assert isinstance(last, Commit)
    assert (last.generation, last.sequence, last.base_length) == (2, 1, 5)


def test_waiting_for_workers_takes_no_longer_than_allowed() -> None:
    bench = Bench(8)
    bench.channels[0].say(Disconnected("gone"))
    bench.pool.poll()
    began = bench.world.now
    assert bench.pool.wait_for_workers(3.0) == 0
    assert bench.world.now - began == pytest.approx(3.0)


def places(session: RemoteSession) -> set[str]:
    """Where drafters of a request are; never two at one worker."""
    found = [feed.channel.address for feed in session.feeds if feed.channel is not None]
    assert len(set(found)) == len(found) == len(session.feeds)
    return set(found)


def test_several_draft_for_a_request_each_in_a_generation_of_its_own() -> None:
    bench = Bench(8, 8, 8, per_request=2)
    session = bench.open()
    assert places(session) == {"w0", "w1"}
    assert [channel.opened for channel in bench.channels] == [[(1, 1)], [(1, 2)], []]
    bench.channels[0].say(growth(session))
    bench.channels[1].say(growth(session, generation=2))
    bench.channels[1].say(growth(session, generation=2, first_id=2))
    bench.pool.poll()
    assert len(session.tree) == 1, "three nodes with the same parent and token are one"
    assert session.proposers(session.tree.slots) == {"w0": 1}
    session.commit(np.array([4]))
    commits = [channel.sent[-1] for channel in bench.channels[:2]]
    assert [(each.generation, each.sequence) for each in commits if isinstance(each, Commit)] == [
        (1, 1),
        (2, 1),
    ]
    session.close()
    assert bench.pool.num_sessions == 2
    bench.pool.poll()
    assert bench.pool.num_sessions == 0
    assert all(isinstance(channel.sent[-1], Close) for channel in bench.channels[:2])


def test_only_the_drafter_that_failed_is_replaced() -> None:
    bench = Bench(8, 8, 8, per_request=2)
    session = bench.open()
    bench.channels[0].say(growth(session))
    bench.channels[1].say(Lost(session=1, generation=2))
    bench.pool.poll()
    assert places(session) == {"w0"}
    bench.later(FIRST_BACKOFF + 0.001)
    assert places(session) == {"w0", "w2"}
    assert (session.stats.generations, session.stats.drafter_failovers) == (3, 1)
    assert len(bench.channels[0].opened) == 1


def test_a_request_takes_what_there_is_and_more_once_it_comes() -> None:
    bench = Bench(8, per_request=3)
    session = bench.open()
    assert places(session) == {"w0"}
    late = Channel("w1", 8)
    bench.pool.add(late)
    bench.pool.poll()
    assert places(session) == {"w0", "w1"}
    assert session.stats.drafter_failovers == 0


def test_nobody_goes_without_while_another_has_several() -> None:
    bench = Bench(1, 1, per_request=2)
    first = bench.open()
    assert places(first) == {"w0", "w1"}
    second = bench.open()
    assert len(places(first)) == len(places(second)) == 1
    third = bench.open()
    assert not third.reachable
    for _ in range(3):
        bench.pool.poll()
    assert len(first.feeds) == len(second.feeds) == 1, "they take each other's places"
    first.close()
    bench.pool.poll()
    assert len(second.feeds) == len(third.feeds) == 1, "who has nobody comes first"
    second.close()
    bench.pool.poll()
    assert places(third) == {"w0", "w1"}
