"""The native module beside its reference: the same trees, ids, counts and errors, whatever arrives."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.actors import growth_tally
from outrider.actors.transport import Overflowed, Received
from outrider.kernels.native import library
from outrider.speculation.living_tree import LivingTree
from outrider.speculation.replication import replica as replica_module
from outrider.speculation.replication.messages import ROOT_ID, Growth
from outrider.speculation.replication.replica import GapError, Placed, Replica
from outrider.speculation.replication.text import CommittedText
from outrider.speculation.tree import MAX_TREE_DEPTH, ROOT, Law

pytestmark = pytest.mark.skipif(
    library.tallier(Received, Growth) is None, reason="the native module is not built or is switched off"
)
SEEDS = st.integers(0, 2**32 - 1)
QUIET = settings(derandomize=True, deadline=None, database=None)
SMALL_WINDOW = 64
"""So that ids grow older than what is remembered."""


class Side:
    """One of the two: a tree, its text and its replica."""

    def __init__(self, prompt: list[int], capacity: int, vocab_size: int, *, native: bool) -> None:
        self.tree, self.text = LivingTree(Law.COUPLED, capacity), CommittedText(np.array(prompt))
        self.vocab_size, self.native = vocab_size, native
        self.begin()

    def begin(self) -> None:
        """The next generation, with the same tree."""
        self.replica = Replica(self.tree, self.text, self.vocab_size)
        if not self.native:
            self.replica._grafter = None

    def apply(self, messages: list[Growth]) -> Placed | str:
        try:
            return self.replica.apply(messages)
        except GapError as error:
            return str(error)

    def commit(self, tokens: list[int]) -> None:
        ids = np.array(tokens)
        self.text.append(ids)
        self.replica.committed(self.tree.reroot(ids))


class Pair:
    """Both sides, what is said to them, and how often what."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.vocab_size = int(rng.choice([2, 3, 50, 1000]))
        capacity = int(rng.choice([2, 3, 12, 60, 200]))
        prompt = rng.integers(0, self.vocab_size, 3).tolist()
        self.sides = [Side(prompt, capacity, self.vocab_size, native=native) for native in (True, False)]
        self.honesty = float(rng.choice([0.9, 0.999, 1.0]))
        self.next_id = ROOT_ID + 1
        self.counts = dict.fromkeys(
            ("natively", "by arrays", "gaps", "stale", "evicted", "deepest", "walked"), 0
        )

    def growth(self) -> Growth:
        """The next message, or one that is doubled, late, or impossible."""
        rng, first, base = self.rng, self.next_id, self.sides[0].text.length
        count = int(rng.integers(0, 25))
        ids = np.arange(first, first + count)
        reach = int(rng.choice([1, 1, 3, 40, 2 * SMALL_WINDOW]))
        parents = np.maximum(ROOT_ID, ids - 1 - rng.integers(0, reach, count))
        parents[rng.random(count) < 0.1] = ROOT_ID
        scores = rng.choice([0.0, 1e-38, 0.25, 0.5, 1.0], count) if rng.random() < 0.4 else rng.random(count)
        tokens = rng.integers(0, self.vocab_size, count)
        base -= int(rng.choice([0, 0, 1, 2])) if base > 2 else 0
        if rng.random() > self.honesty:
            first += int(rng.integers(-5, 3))
        if count and rng.random() > self.honesty:
            tokens[-1] = rng.choice([-1, self.vocab_size, 2**31 - 1])
        if count and rng.random() > self.honesty:
            parents[-1] = ids[-1] + int(rng.integers(0, 9))
        if rng.random() > self.honesty:
            base += 5
        if first == self.next_id:
            self.next_id += count
        return Growth(
            session=1, generation=1, seen_commit=int(rng.integers(3)), base_length=max(base, 0),
            first_id=first, parents=parents, tokens=tokens, scores=scores.astype(np.float32),
        )  # fmt: skip

    def apply(self) -> None:
        messages = [self.growth() for _ in range(int(self.rng.integers(1, 5)))]
        before = self.sides[0].tree._next_birth
        native = self.sides[0].replica
        declined = native._grafter is not None and declines(native, messages)
        ours, theirs = (side.apply(messages) for side in self.sides)
        assert ours == theirs
        tree = self.sides[0].tree
        self.counts["by arrays" if declined else "natively"] += 1
        self.counts["deepest"] = max(self.counts["deepest"], int(tree.depths.max()))
        self.counts["evicted"] += len(tree) == tree.capacity and tree._next_birth > before
        self.counts["walked"] += bool((native._positions >= 0).any())
        if isinstance(ours, Placed):
            self.counts["stale"] += ours.stale
        else:
            self.counts["gaps"] += 1
            self.next_id = ROOT_ID + 1
            for side in self.sides:
                side.begin()

    def commit(self) -> None:
        tree, rng = self.sides[0].tree, self.rng
        slot, tokens = int(rng.choice(np.append(tree.slots, ROOT))), []
        while slot != ROOT:
            tokens.append(int(tree.tokens[slot]))
            slot = int(tree.parents[slot])
        tokens = tokens[::-1][: int(rng.integers(0, 8))]
        if rng.random() < 0.3 or not tokens:
            tokens.append(int(rng.integers(self.vocab_size)))
        for side in self.sides:
            side.commit(tokens)

    def differences(self) -> list[str]:
        """Names of everything in which the two sides are not bitwise the same."""
        ours, theirs = self.sides
        free = ours.tree._num_free
        found = [] if ours.tree.counters == theirs.tree.counters else ["counters"]
        for mine, yours in zip(ours.tree.storage, theirs.tree.storage, strict=True):
            cut = free if mine is ours.tree._free else None
            if mine[:cut].tobytes() != yours[:cut].tobytes():
                found.append(f"tree storage of {mine.dtype}")
        mine, yours = ours.replica, theirs.replica
        placed = mine._slots >= 0
        names = ("_slots", "_positions", "_committed_births", "_committed_positions")
        found += [name for name in names if not np.array_equal(getattr(mine, name), getattr(yours, name))]
        if not np.array_equal(mine._births[placed], yours._births[placed]):
            found.append("_births")
        if (mine.seen_commit, mine._next_id) != (yours.seen_commit, yours._next_id):
            found.append("seen_commit or _next_id")
        return found


def declines(replica: Replica, messages: list[Growth]) -> bool:
    """Whether the native module leaves these messages to the arrays; it must not change anything then."""
    arrays = [*replica.tree.storage, replica._slots, replica._births, replica._positions]
    before = [array.copy() for array in arrays]
    assert replica._grafter is not None
    declined = (
        replica._grafter.place(
            messages, replica._next_id, *replica.tree.counters, replica.text.ids,
            replica._committed_births, replica._committed_positions,
        )
        is None
    )  # fmt: skip
    assert not declined or all(map(np.array_equal, arrays, before))
    for array, old in zip(arrays, before, strict=True):
        array[:] = old
    return declined


def live(seed: int, steps: int = 30) -> tuple[dict[str, int], list[str]]:
    """A random life of both sides: what happened in it, and wherein they came apart."""
    differences: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replica_module, "WINDOW", SMALL_WINDOW)
        pair = Pair(seed)
        for _ in range(steps):
            pair.apply()
            differences += pair.differences()
            if pair.rng.random() < 0.3:
                pair.commit()
                differences += pair.differences()
    return pair.counts, differences


@settings(QUIET, max_examples=200)
@given(seed=SEEDS)
def test_native_and_reference_are_the_same(seed: int) -> None:
    _, differences = live(seed)
    assert differences == []


def test_random_lives_meet_all_that_is_special() -> None:
    """Or the test above would say little."""
    lives = [live(seed)[0] for seed in range(40)]
    total = {name: sum(each[name] for each in lives) for name in lives[0]}
    assert max(each["deepest"] for each in lives) == MAX_TREE_DEPTH
    assert total["natively"] > total["by arrays"] > 10
    assert min(total[name] for name in ("gaps", "stale", "evicted", "walked")) > 10, total


def message(**changes: object) -> Growth:
    return replace(
        Growth(
            session=1, generation=1, seen_commit=0, base_length=3, first_id=1, parents=np.array([0, 1]),
            tokens=np.array([1, 2]), scores=np.ones(2, np.float32),
        ),
        **changes,
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"parents": np.array([0])},
        {"scores": np.ones(3, np.float32)},
        {"tokens": np.zeros(0, np.int64)},
        {"parents": np.array([0, 1], np.int32)},
        {"scores": np.ones(2)},
        {"tokens": np.array([1, 2]).astype(">i8")},
        {"tokens": np.array([1, 0, 2])[::2]},
        {"tokens": np.array([[1, 2]])},
        {"tokens": [1, 2]},
        {"first_id": "1"},
        {"base_length": 2**70},
    ],
    ids=lambda changes: f"{next(iter(changes))}",
)
def test_what_is_no_growth_raises_and_changes_nothing(changes: dict[str, object]) -> None:
    side = Side([1, 2, 3], 8, 9, native=True)
    with pytest.raises((TypeError, ValueError, OverflowError)):
        side.replica.apply([message(**changes)])
    assert len(side.tree) == 0
    with pytest.raises(TypeError):
        side.replica.apply([object()])  # type: ignore[list-item]
    assert side.replica.apply([message()]) == Placed(2, 0)


@settings(QUIET, max_examples=100)
@given(seed=SEEDS)
def test_wild_scores_leave_a_tree(seed: int) -> None:
    """The wire refuses them; were they to come through, nothing would break but the order."""
    rng = np.random.default_rng(seed)
    side = Side([1, 2, 3], 12, 2**31, native=True)
    next_id, wild = 1, np.array([np.nan, np.inf, -np.inf, -1.0, 0.0, 0.5, 1.0, 3e38], np.float32)
    with np.errstate(all="ignore"):
        for _ in range(12):
            ids = np.arange(next_id, next_id + int(rng.integers(1, 20)))
            side.apply(
                [message(
                    first_id=next_id, parents=rng.integers(np.maximum(0, ids - 6), ids),
                    tokens=rng.integers(0, 2**31, len(ids)), scores=rng.choice(wild, len(ids)),
                )]
            )  # fmt: skip
            next_id = side.replica._next_id
            tree = side.tree
            free = tree._free[: tree._num_free].tolist()
            assert sorted(free + tree.slots.tolist()) == list(range(tree.capacity))
            if len(tree) and rng.random() < 0.3:
                side.commit([int(rng.choice(tree.tokens[tree.slots]))])


def received(rng: np.random.Generator) -> Received:
    count = int(rng.integers(0, 4))
    growth = message(
        session=int(rng.integers(3)), generation=int(rng.integers(1, 3)), seen_commit=int(rng.integers(3)),
        parents=np.zeros(count, np.int64), tokens=np.zeros(count, np.int64),
        scores=np.ones(count, np.float32),
        final=bool(rng.random() < 0.3), draft_steps=int(rng.integers(3)), draft_rows=int(rng.integers(9)),
        draft_seconds=float(rng.integers(8)) / 4, sent_at=float(rng.normal()),
    )  # fmt: skip
    return Received(growth if rng.random() < 0.9 else Overflowed(), int(rng.integers(300)))


@settings(QUIET, max_examples=100)
@given(seed=SEEDS)
def test_tallies_are_the_same(seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrived, start = [received(rng) for _ in range(int(rng.integers(40)))], 0
    while start < len(arrived):
        grown, end = growth_tally.by_session(arrived, start)
        assert (grown, end) == growth_tally.by_session_reference(arrived, start)
        assert list(grown) == list(growth_tally.by_session_reference(arrived, start)[0])
        for growths in grown.values():
            tally = growth_tally.tally(growths, 1, 2)
            assert tally == growth_tally.tally_reference(growths, 1, 2)
            between = growth_tally.seconds_between(tally.messages, -0.5, 0.5)
            assert between == growth_tally.seconds_between_reference(tally.messages, -0.5, 0.5)
        start = end + 1
