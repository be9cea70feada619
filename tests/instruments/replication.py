"""A drafter's tree and its replica, with messages that come late, in batches and across commits.

Checks raise AssertionError when the replica holds what it must not, or lacks what it must hold.
"""

from dataclasses import replace

import numpy as np

from instruments.hostile import HostileChannel
from outrider.actors import wire
from outrider.actors.remote_session import RemoteSession
from outrider.actors.transport import Received
from outrider.actors.virtual import VirtualClock
from outrider.speculation.living_tree import LivingTree
from outrider.speculation.replication.messages import ROOT_ID, Commit, Growth, GrowthLimits, Open
from outrider.speculation.replication.pace import LinkPace
from outrider.speculation.replication.publisher import Publisher
from outrider.speculation.replication.replica import GapError, Placed, Replica
from outrider.speculation.replication.text import CommittedText
from outrider.speculation.request import Request
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.statistics import SpeculationStatistics
from outrider.speculation.tree import ROOT, Law
from outrider.speculation.types import IntArray

Text = tuple[int, ...]
LIMITS = GrowthLimits(width=3, children=2, steps=-1, min_score=0.0)


def texts_of(tree: LivingTree, base: IntArray) -> set[Text]:
    """What each node of a tree below ``base`` stands for: the whole text up to it."""
    found: dict[int, Text] = {ROOT: tuple(base.tolist())}
    for slot in sorted(tree.slots.tolist(), key=lambda slot: int(tree.depths[slot])):
        found[slot] = (*found[int(tree.parents[slot])], int(tree.tokens[slot]))
    return set(found.values()) - {found[ROOT]}


class Replication:
    """One generation: the drafter, the target, and messages that wait on the wire.

    said: every path that the drafter has published so far.
    """

    def __init__(self, prompt: IntArray, vocab_size: int, *, capacity: int = 400) -> None:
        self.grown, self.tree = LivingTree(Law.COUPLED, capacity), LivingTree(Law.COUPLED, capacity)
        self.text = CommittedText(prompt)
        self.replica = Replica(self.tree, self.text, vocab_size)
        opening = Open(
            session=1, generation=1, token_ids=prompt, prompt_length=len(prompt),
            params=SamplingParams(seed=0), choice=0, limits=LIMITS,
        )  # fmt: skip
        self.publisher = Publisher(opening, self.grown)
        self.up: list[Growth] = []
        self.down: list[Commit] = []
        self.said: set[Text] = set()
        self.placed = Placed(0, 0)
        self._sequence = 0

    def grow(self, rng: np.random.Generator, vocab_size: int) -> None:
        """One draft step, whose growth is sent."""
        frontier = self.grown.frontier(3)
        if len(frontier):
            tokens = np.concatenate([rng.permutation(vocab_size)[:2] for _ in frontier])
            self.grown.mark_expanded(frontier)
            self.grown.add(np.repeat(frontier, 2), tokens, rng.random(len(tokens)))
        self.publish()

    def publish(self) -> None:
        for growth in self.publisher.publish(
            final=False, draft_steps=1, draft_rows=1, draft_seconds=0.0, sent_at=0.0
        ):
            decoded = wire.decode_drafter(wire.encode_drafter(growth))
            assert isinstance(decoded, Growth)
            self.up.append(decoded)
        self.said |= texts_of(self.grown, self.publisher.text.ids)

    def arrive(self, count: int | None = None) -> None:
        """The target takes in the oldest ``count`` messages, or all, in one batch."""
        count = len(self.up) if count is None else count
        arrived, self.up = self.up[:count], self.up[count:]
        placed = self.replica.apply(arrived)
        self.placed = Placed(self.placed.nodes + placed.nodes, self.placed.stale + placed.stale)
        assert 0 <= placed.stale <= placed.nodes == sum(len(growth.tokens) for growth in arrived)

    def commit(self, tokens: list[int]) -> None:
        """The target moves on; the drafter hears of it later."""
        ids, base = np.array(tokens, np.int64), self.text.length
        self._sequence += 1
        self.text.append(ids)
        self.replica.committed(self.tree.reroot(ids))
        commit = Commit(
            session=1, generation=1, sequence=self._sequence, base_length=base, tokens=ids,
            prefix_hash=self.text.prefix_hash, steps=-1,
        )  # fmt: skip
        self.down.append(commit)

    def hear(self) -> None:
        """The drafter takes in the oldest commit."""
        commit = self.down.pop(0)
        assert self.publisher.accepts(commit)
        assert not self.publisher.accepts(commit)
        self.grown.reroot(commit.tokens)

    def path_to(self, slot: int) -> list[int]:
        path: list[int] = []
        while slot != ROOT:
            path.append(int(self.tree.tokens[slot]))
            slot = int(self.tree.parents[slot])
        return path[::-1]

    def require_alike(self) -> None:
        """What was said and continues the text is in the replica, and nothing else is.

        True while nothing is on its way up and no tree is full.
        """
        base, length = tuple(self.text.ids.tolist()), self.text.length
        found = texts_of(self.tree, self.text.ids)
        continuing = {text for text in self.said if len(text) > length and text[:length] == base}
        assert found <= continuing, f"the replica holds {found - continuing}, which nobody said"
        alive = texts_of(self.grown, self.publisher.text.ids)
        wanted = {text for text in alive if len(text) > length and text[:length] == base}
        assert wanted <= found, f"the replica lacks {wanted - found}"
        assert len(self.tree) == len(found)


def check_replication(seed: int, *, steps: int = 50) -> Placed:
    """A random life of two trees; what was placed in all."""
    rng = np.random.default_rng(seed)
    vocab_size = int(rng.choice([2, 3, 6]))
    pair = Replication(rng.integers(0, vocab_size, 5), vocab_size)
    eagerness = float(rng.choice([0.2, 0.5, 0.9]))
    for _ in range(steps):
        pair.grow(rng, vocab_size)
        if rng.random() < eagerness:
            pair.arrive(int(rng.integers(len(pair.up) + 1)))
        if not pair.up:
            pair.require_alike()
        if rng.random() < 0.4:
            slots = np.append(pair.tree.slots, ROOT)
            foreseen = pair.path_to(int(rng.choice(slots)))
            pair.commit([*foreseen, int(rng.integers(vocab_size))])
        if pair.down and rng.random() < 0.5:
            pair.hear()
    pair.arrive()
    pair.require_alike()
    while pair.down:
        pair.hear()
    pair.publish()
    pair.arrive()
    pair.require_alike()
    remembered = len(pair.replica._committed_births)
    assert remembered <= 1, "more than the root is remembered of acknowledged commits"
    return pair.placed


def chain_of(first_id: int, parent: int, tokens: list[int], base_length: int, seen: int = 0) -> Growth:
    """One path, below ``parent``."""
    count = len(tokens)
    return Growth(
        session=1,
        generation=1,
        seen_commit=seen,
        base_length=base_length,
        first_id=first_id,
        parents=np.array([parent, *range(first_id, first_id + count - 1)]),
        tokens=np.array(tokens),
        scores=np.full(count, 0.5, np.float32),
    )


def check_crossing() -> None:
    """Growth that crossed a commit on the wire is walked down the committed tokens."""
    pair = Replication(np.array([1, 2, 3]), 9)
    pair.commit([4, 5])
    pair.replica.apply([chain_of(1, ROOT_ID, [4, 5, 6, 7], 3)])
    assert texts_of(pair.tree, pair.text.ids) == {(1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6, 7)}
    pair.replica.apply([chain_of(5, 2, [8], 3), chain_of(6, 1, [6], 3), chain_of(7, 4, [8], 3)])
    below = {text[5:] for text in texts_of(pair.tree, pair.text.ids)}
    assert below == {(6,), (6, 7), (8,), (6, 7, 8)}, "a child of token 1 of the commit is no continuation"


def check_aliases() -> None:
    """A node that was committed stands for its position, below which growth goes on."""
    pair = Replication(np.array([1, 2, 3]), 9)
    pair.replica.apply([chain_of(1, ROOT_ID, [4, 5, 6], 3)])
    pair.commit([4, 5])
    # Below the last committed token; below the first, and along the commit; below a live node.
    late = [chain_of(4, 2, [7], 3), chain_of(5, 1, [5, 8], 3), chain_of(7, 3, [1], 3)]
    pair.replica.apply(late)
    below = {text[5:] for text in texts_of(pair.tree, pair.text.ids)}
    assert below == {(6,), (6, 1), (7,), (8,)}


def check_stale() -> None:
    """What contradicts the committed text is dropped and counted, with all below it."""
    pair = Replication(np.array([1, 2, 3]), 9)
    pair.replica.apply([chain_of(1, ROOT_ID, [4, 5, 6], 3)])
    pair.commit([4, 7])
    placed = pair.replica.apply([chain_of(4, 3, [8, 8], 3), chain_of(6, 1, [7, 2], 3)])
    assert texts_of(pair.tree, pair.text.ids) == {(1, 2, 3, 4, 7, 2)}
    assert placed == Placed(4, 2)


def check_gaps() -> None:
    """A message that is missing ends the generation; one that came before does nothing."""
    pair = Replication(np.array([1, 2, 3]), 9)
    first = chain_of(1, ROOT_ID, [4, 5], 3)
    assert pair.replica.apply([first, first]) == Placed(2, 0)
    assert pair.replica.apply([first]) == Placed(0, 0)
    assert ends_generation(pair, chain_of(4, 1, [6], 3)), "growth was lost, and nobody noticed"


def ends_generation(pair: Replication, growth: Growth) -> bool:
    """Whether the replica refuses to go on."""
    try:
        pair.replica.apply([growth])
    except GapError:
        return True
    return False


def check_generations() -> None:
    """Growth of an earlier generation is counted, and not placed: its ids mean other nodes."""
    world = VirtualClock()
    stats = SpeculationStatistics()
    request = Request(prompt_ids=np.array([1, 2, 3]), params=SamplingParams(seed=0))
    session = RemoteSession(
        1, request, limits=LIMITS, vocab_size=9, capacity=64, stats=stats, clock=world
    )  # fmt: skip
    channel = HostileChannel(world, 9)
    (feed,) = session.all_feeds
    feed.open_at(channel, "drafter", LinkPace())
    feed.give_up()
    feed.open_at(channel, "drafter", LinkPace())
    old, new = chain_of(1, ROOT_ID, [4, 5], 3), chain_of(1, ROOT_ID, [6], 3)
    feed.receive([Received(old, 1)])
    feed.absorb()
    assert len(session.tree) == 0, "growth of an earlier generation was taken in"
    assert (stats.stale_messages, stats.stale_nodes) == (1, 2)
    feed.receive([Received(replace(new, generation=2), 1)])
    feed.absorb()
    assert texts_of(session.tree, request.prompt_ids) == {(1, 2, 3, 6)}
