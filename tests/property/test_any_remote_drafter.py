"""A draft worker that says anything at any time: output is the plain one, nothing piles up, nobody waits."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instruments.hostile import HostileChannel
from instruments.remote import Finished, Pace, Target, TimedTable, plain
from instruments.table_lm import TableLM

from outrider.actors.draft_pool import REPLICA_CAPACITY
from outrider.actors.remote_session import RemoteSession
from outrider.actors.virtual import VirtualArrivals, VirtualClock
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.replication.messages import MAX_GROWTH_NODES, Growth, Lost
from outrider.speculation.replication.replica import MAX_ALIASES, WINDOW
from outrider.speculation.sampling_params import SamplingParams

VOCAB = 5
PROMPT = [1, 2, 3]
LM = TableLM.random(7, vocab_size=VOCAB, order=2)
PIPELINES = pytest.mark.parametrize("pipeline", ["parallel", "serial", "pearl"])
PARAMS = SamplingParams(seed=3, max_tokens=24)
SCORES = [0.0, 1e-38, 0.3, 0.9, 1.0, 1.0, 1.0]
WILD_SCORES = [np.nan, np.inf, -0.5, 1.5, 3e38]


class Liar:
    """Sends growth that is right as often as not, so that much of it is taken in.

    honesty: the chance that a value of a message is what it should be. number: among the drafters.
    """

    def __init__(
        self, seed: int, honesty: float, target: Target, channel: HostileChannel, number: int = 0
    ) -> None:
        self._rng, self._honesty = np.random.default_rng([seed, number]), honesty
        self._number = number
        self._target, self._channel = target, channel
        self._generation, self._next_id = 0, 1
        self.sessions: list[RemoteSession] = []

    def speak(self) -> None:
        """One message about what the target has opened last, or about something else."""
        opened, rng = self._channel.opened, self._rng
        if opened is None:
            return
        if rng.random() > self._honesty:
            self._channel.say(rng.bytes(int(rng.integers(30))))
            return
        if opened.generation != self._generation:
            self._generation, self._next_id = opened.generation, 1
        number = self._maybe(opened.session, rng.integers(4))
        generation = self._maybe(opened.generation, rng.integers(6))
        if rng.random() < 0.03:
            self._channel.say(Lost(session=number, generation=generation))
        else:
            self._channel.say(self._growth(number, generation))

    def _growth(self, session: int, generation: int) -> Growth:
        rng = self._rng
        count = int(rng.integers(0, 40)) if rng.random() < 0.95 else MAX_GROWTH_NODES + int(rng.integers(2))
        first = self._maybe(self._next_id, rng.integers(1, self._next_id + 50))
        ids = np.arange(first, first + count)
        parents = np.where(rng.random(count) < 0.3, 0, rng.integers(np.maximum(0, ids - 9), ids))
        tokens = rng.integers(0, VOCAB, count)
        scores = rng.choice(SCORES, count)
        if count:
            at = int(rng.integers(count))
            parents[at] = self._maybe(int(parents[at]), rng.integers(0, first + count))
            tokens[at] = self._maybe(int(tokens[at]), rng.integers(0, 2**32))
            scores[at] = self._maybe(float(scores[at]), rng.choice(WILD_SCORES))
        if generation == self._generation:
            self._next_id = first + count
        replica = self._session(session)
        sequence = replica.all_feeds[self._number]._sequence if replica else 0
        return Growth(
            session=session,
            generation=generation,
            seen_commit=self._maybe(sequence, rng.integers(0, sequence + 3)),
            base_length=self._maybe(replica.text.length if replica else 3, rng.integers(0, 40)),
            first_id=first,
            parents=parents,
            tokens=tokens,
            scores=scores.astype(np.float32),
            final=bool(rng.random() < 0.2),
            draft_steps=int(rng.integers(0, 3)),
            draft_rows=int(rng.integers(0, 9)),
            draft_seconds=self._maybe(0.01, rng.choice([0.0, 1e11, np.inf])),
            sent_at=self._maybe(self._target.world.now, rng.choice([-1e11, 1e11, np.nan])),
        )

    def _session(self, number: int) -> RemoteSession | None:
        known = {each.number: each for each in self.sessions}
        return known.get(number)

    def _maybe(self, right: float, wrong: object) -> "int":
        """Either value; typed as the callers that need it most."""
        return right if self._rng.random() < self._honesty else wrong  # type: ignore[return-value]


def hostile_target(pipeline: str) -> tuple[Target, HostileChannel]:
    target, (channel,) = target_among_liars(pipeline, 1)
    return target, channel


def target_among_liars(pipeline: str, count: int) -> tuple[Target, list[HostileChannel]]:
    """All of which draft for each of its requests."""
    world = VirtualClock()
    channels = [HostileChannel(world, VOCAB) for _ in range(count)]
    target = Target(
        world, TimedTable(LM, world, Pace(target=0.03)), channels, VirtualArrivals(world, channels),
        pipeline=pipeline, shape=TreeShape(), num_drafters=count,
    )  # fmt: skip
    target.pool.poll()
    return target, channels


def session_of(outcome: Finished) -> RemoteSession:
    session = outcome.run._draft
    assert isinstance(session, RemoteSession)
    return session


def require_bounded(session: RemoteSession) -> None:
    assert len(session.tree) <= session.tree.capacity == REPLICA_CAPACITY
    for feed in session.all_feeds:
        assert feed._pending == []
        replica = feed._replica
        if replica is None:
            continue
        assert len(replica._slots) == len(replica._births) == len(replica._positions) == WINDOW
        assert len(replica._committed_births) == len(replica._committed_positions) <= MAX_ALIASES


@PIPELINES
@settings(derandomize=True, deadline=None, database=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    honesty=st.sampled_from([0.5, 0.9, 0.99, 0.999]),
    pause=st.sampled_from([0.0007, 0.004, 0.03]),
    greedy=st.booleans(),
    count=st.sampled_from([1, 1, 2]),
)
def test_output_does_not_depend_on_what_workers_say(
    pipeline: str, seed: int, honesty: float, pause: float, greedy: bool, count: int
) -> None:
    params = replace(PARAMS, temperature=0.0 if greedy else 1.0)
    target, channels = target_among_liars(pipeline, count)
    liars = [Liar(seed, honesty, target, each, number) for number, each in enumerate(channels)]
    running = [target.start(PROMPT, params), target.start([4], params)]
    sessions = [session_of(each) for each in running]
    for liar in liars:
        # With pearl a request has but one drafter.
        liar.sessions = [] if pipeline == "pearl" and count > 1 else sessions

    def say_more(liar: Liar) -> None:
        liar.speak()
        target.world.after(pause, partial(say_more, liar))

    def between() -> None:
        for session in sessions:
            require_bounded(session)

    for liar in liars:
        say_more(liar)
    target.finish(running, between)
    assert running[0].token_ids == plain(LM, PROMPT, params)
    assert running[1].token_ids == plain(LM, [4], params)
    assert target.lm.forwards <= params.max_tokens


@PIPELINES
def test_the_liar_is_believed_now_and_then(pipeline: str) -> None:
    """Or the test above would say little."""
    target, channel = hostile_target(pipeline)
    liar = Liar(5, 0.999, target, channel)
    outcome = target.start(PROMPT, PARAMS)
    liar.sessions = [session_of(outcome)]

    def say_more() -> None:
        liar.speak()
        target.world.after(0.002, say_more)

    say_more()
    target.finish([outcome])
    assert outcome.stats.growth_nodes > 50
    assert outcome.stats.num_accepted_tokens > 1
    assert channel.breaches > 0
    assert outcome.stats.generations > 1


@PIPELINES
@pytest.mark.parametrize("nodes", [0, 1, 256])
def test_a_flood_is_taken_in_or_ends_the_generation(pipeline: str, nodes: int) -> None:
    """Thousands of messages per step; what one step takes in is bounded."""
    target, channel = hostile_target(pipeline)
    params = replace(PARAMS, max_tokens=8)
    outcome = target.start(PROMPT, params)
    session = session_of(outcome)
    sent = 0

    def flood() -> None:
        nonlocal sent
        if channel.opened is not None:
            for number in range(2000):
                first = 1 + number * nodes
                channel.say(
                    Growth(
                        session=1, generation=channel.opened.generation, seen_commit=0, base_length=3,
                        first_id=first, parents=np.zeros(nodes, np.int64), tokens=np.arange(nodes) % VOCAB,
                        scores=np.ones(nodes, np.float32), final=True,
                    )
                )  # fmt: skip
                sent += 1
        target.world.after(0.03, flood)

    flood()
    target.finish([outcome], lambda: require_bounded(session))
    assert sent > 10_000
    assert outcome.token_ids == plain(LM, PROMPT, params)


@PIPELINES
def test_endless_growth_fills_no_more_than_the_tree(pipeline: str) -> None:
    """A worker that never stops, below its own last nodes, for far more ids than are remembered."""
    target, channel = hostile_target(pipeline)
    params = replace(PARAMS, max_tokens=60)
    outcome = target.start(PROMPT, params)
    session = session_of(outcome)
    rng = np.random.default_rng(0)
    next_id = {"of": 0, "is": 1}

    def grow() -> None:
        if channel.opened is not None:
            generation = channel.opened.generation
            first = next_id["is"] if next_id["of"] == generation else 1
            parents = [max(0, each - int(rng.integers(1, 300))) for each in range(first, first + 200)]
            channel.say(
                Growth(
                    session=1, generation=generation, seen_commit=session.all_feeds[0]._sequence,
                    base_length=session.text.length, first_id=first, parents=np.array(parents),
                    tokens=rng.integers(0, VOCAB, 200), scores=np.ones(200, np.float32),
                )
            )  # fmt: skip
            next_id.update({"of": generation, "is": first + 200})
        target.world.after(0.005, grow)

    grow()
    target.finish([outcome], lambda: require_bounded(session))
    assert outcome.token_ids == plain(LM, PROMPT, params)
    assert outcome.stats.growth_nodes > WINDOW
    assert outcome.stats.generations == 1
    assert all(len(tree) <= TreeShape().num_speculative_tokens for tree in target.lm.trees)
