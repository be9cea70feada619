"""A drafter's tree and its replica under random delays, and forests grafted at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instruments.replication import (
    Replication,
    Text,
    chain_of,
    check_aliases,
    check_crossing,
    check_gaps,
    check_generations,
    check_replication,
    check_stale,
    texts_of,
)

from outrider.speculation.living_tree import DROPPED, SMALLEST_SCORE, LivingTree
from outrider.speculation.replication.messages import ROOT_ID
from outrider.speculation.replication.replica import MAX_ALIASES, WINDOW, GapError, Placed
from outrider.speculation.tree import MAX_TREE_DEPTH, ROOT, Law
from outrider.speculation.types import FloatArray, IntArray

SEEDS = st.integers(0, 2**32 - 1)
QUIET = settings(derandomize=True, deadline=None, database=None)


@settings(QUIET, max_examples=120)
@given(seed=SEEDS)
def test_a_replica_becomes_what_its_drafter_has(seed: int) -> None:
    check_replication(seed)


def test_random_lives_cross_commits_on_the_wire() -> None:
    """Or the test above would say little: much is stale, most is not."""
    total = [check_replication(seed) for seed in range(8)]
    nodes, stale = sum(each.nodes for each in total), sum(each.stale for each in total)
    assert nodes > 800
    assert 0.05 < stale / nodes < 0.9


def test_growth_that_crossed_a_commit_is_walked_down_the_committed_tokens() -> None:
    check_crossing()


def test_a_committed_node_stays_the_parent_of_later_growth() -> None:
    check_aliases()


def test_what_contradicts_the_text_is_stale() -> None:
    check_stale()


def test_aliases_within_one_message_are_one_node() -> None:
    pair = Replication(np.array([1, 2, 3]), 9)
    twins = [chain_of(1, ROOT_ID, [4, 5], 3), chain_of(3, ROOT_ID, [4, 6], 3), chain_of(5, 3, [5, 7], 3)]
    assert pair.replica.apply(twins) == Placed(6, 0)
    below = {text[3:] for text in texts_of(pair.tree, pair.text.ids)}
    assert below == {(4,), (4, 5), (4, 6), (4, 5, 7)}
    pair.commit([4])
    pair.replica.apply([chain_of(7, 3, [8], 3), chain_of(8, 1, [8], 3)])
    assert {text[4:] for text in texts_of(pair.tree, pair.text.ids)} == {(5,), (6,), (5, 7), (8,)}


def test_old_messages_are_ignored_and_gaps_are_not() -> None:
    check_gaps()


def test_growth_of_an_earlier_generation_is_not_placed() -> None:
    check_generations()


@pytest.mark.parametrize(
    ("tokens", "parent", "base", "reason"),
    [
        ([9], 0, 3, "token 9"),
        ([-1], 0, 3, "vocabulary"),
        ([1], 1, 3, "later ones"),
        ([1], 0, 4, "knows 4 of 3"),
    ],
)
def test_impossible_growth_ends_the_generation(
    tokens: list[int], parent: int, base: int, reason: str
) -> None:
    pair = Replication(np.array([1, 2, 3]), 9)
    with pytest.raises(GapError, match=reason):
        pair.replica.apply([chain_of(1, parent, tokens, base)])


def test_a_long_generation_forgets_the_oldest_ids() -> None:
    """Ids and aliases are bounded, and what hangs below a forgotten node is stale."""
    pair = Replication(np.array([1, 2, 3]), 9)
    pair.replica.apply([chain_of(1, ROOT_ID, [4], 3)])
    for first in range(2, WINDOW + 3, 100):
        assert pair.replica.apply([chain_of(first, ROOT_ID, [5] * 100, 3)]).nodes == 100
    assert pair.replica.apply([chain_of(first + 100, 1, [6], 3)]) == Placed(1, 1)
    assert len(pair.replica._slots) == len(pair.replica._births) == WINDOW
    next_id = first + 101
    for _ in range(MAX_ALIASES // 8 + 20):
        pair.replica.apply([chain_of(next_id, ROOT_ID, [4] * 8, pair.text.length)])
        pair.replica.seen_commit = 0
        next_id += 8
        pair.commit([4] * 8)
    assert len(pair.replica._committed_births) == len(pair.replica._committed_positions) <= MAX_ALIASES


class Grafting:
    """The same forests for two trees, one of which takes them level by level."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.capacity = int(rng.choice([1, 3, 8, 30, 100]))
        self.vocab_size = int(rng.choice([2, 5, 1000]))
        self.tree, self.other = (LivingTree(Law.COUPLED, self.capacity) for _ in range(2))

    def forest(self) -> tuple[IntArray, IntArray, IntArray, FloatArray]:
        """Parents, indices within, tokens and scores; sometimes one long chain, sometimes with ties."""
        rng, count = self.rng, int(self.rng.integers(1, 60))
        inside = np.full(count, -1)
        deep = rng.random() < 0.3
        for node in range(1, count):
            if deep or rng.random() < 0.6:
                inside[node] = node - 1 if deep and rng.random() < 0.95 else rng.integers(0, node)
        parents = rng.choice(np.append(self.tree.slots, ROOT), count)
        parents[inside >= 0] = ROOT
        scores = rng.choice([0.0, 0.25, 0.5, 1.0], count) if rng.random() < 0.5 else rng.random(count)
        return parents, inside, rng.integers(0, self.vocab_size, count), scores

    def violations(self) -> list[str]:
        """What no tree may be; one that cannot be selected from raises."""
        tree = self.tree
        live = tree.slots
        above = np.where(tree.parents[live] == ROOT, 1.0, tree.path_scores[tree.parents[live]])
        tree.select(self.capacity)
        rules = {
            "a child scores above its parent": (tree.path_scores[live] <= above).all(),
            "a score is too small": (tree.path_scores[live] >= SMALLEST_SCORE).all(),
            "a node is too deep": (tree.depths[live] <= MAX_TREE_DEPTH).all(),
            "there are too many nodes": len(tree) <= self.capacity,
        }
        return [violation for violation, kept in rules.items() if not kept]


def require_right_slots(tree: LivingTree, slots: IntArray, inside: IntArray, tokens: IntArray) -> None:
    """Each node lies where it is said to, below its parent; dropped ones have no children."""
    placed = slots >= 0
    assert (slots[~placed] == DROPPED).all()
    assert (tree.depths[slots[placed]] > 0).all()
    assert (tree.tokens[slots[placed]] == tokens[placed]).all()
    inner = placed & (inside >= 0)
    assert (tree.parents[slots[inner]] == slots[inside[inner]]).all()


@settings(QUIET, max_examples=150)
@given(seed=SEEDS)
def test_a_forest_grafted_at_once_is_sound(seed: int) -> None:
    grafting = Grafting(np.random.default_rng(seed))
    for _ in range(5):
        parents, inside, tokens, scores = grafting.forest()
        slots = grafting.tree.graft(parents, inside, tokens, scores)
        require_right_slots(grafting.tree, slots, inside, tokens)
        assert grafting.violations() == []


def forest_paths(tree: LivingTree, parents: IntArray, inside: IntArray, tokens: IntArray) -> set[Text]:
    """All paths of the tree and of a forest below it, by definition."""
    known = slot_paths(tree)
    paths: list[Text] = []
    for parent, within, token in zip(parents.tolist(), inside.tolist(), tokens.tolist(), strict=True):
        paths.append((*(paths[within] if within >= 0 else known.get(parent, ())), token))
    return {path for path in [*paths, *known.values()] if len(path) <= MAX_TREE_DEPTH}


def slot_paths(tree: LivingTree) -> dict[int, Text]:
    """Each node's tokens from the root downwards."""
    paths: dict[int, Text] = {ROOT: ()}
    for slot in sorted(tree.slots.tolist(), key=lambda slot: int(tree.depths[slot])):
        paths[slot] = (*paths[int(tree.parents[slot])], int(tree.tokens[slot]))
    del paths[ROOT]
    return paths


@settings(QUIET, max_examples=150)
@given(seed=SEEDS)
def test_a_forest_that_fits_is_all_there(seed: int) -> None:
    """Aliases, ties and too deep chains: the paths are those of the definition."""
    grafting = Grafting(np.random.default_rng(seed))
    grafting.tree = LivingTree(Law.COUPLED, 400)
    for _ in range(5):
        parents, inside, tokens, scores = grafting.forest()
        wanted = forest_paths(grafting.tree, parents, inside, tokens)
        slots = grafting.tree.graft(parents, inside, tokens, scores)
        assert set(slot_paths(grafting.tree).values()) == wanted
        require_right_slots(grafting.tree, slots, inside, tokens)


@settings(QUIET, max_examples=150)
@given(seed=SEEDS)
def test_grafting_at_once_is_grafting_level_by_level(seed: int) -> None:
    """The same paths with the same scores, in trees with little room; no two scores are equal."""
    grafting = Grafting(np.random.default_rng(seed))
    tree, other, rng = grafting.tree, grafting.other, grafting.rng
    for _ in range(5):
        parents, inside, tokens, _ = grafting.forest()
        scores = 1.0 - 0.5 * rng.random(len(tokens))
        same = {path: slot for slot, path in slot_paths(other).items()} | {(): ROOT}
        known = slot_paths(tree) | {ROOT: ()}
        others = np.array([same[known[parent]] for parent in parents.tolist()])
        slots = tree.graft(parents, inside, tokens, scores)
        other._graft_by_levels(others, inside, tokens, scores)
        require_right_slots(tree, slots, inside, tokens)
        mine, theirs = slot_paths(tree), slot_paths(other)
        assert set(mine.values()) == set(theirs.values())
        score = {path: other.path_scores[slot] for slot, path in theirs.items()}
        assert all(np.isclose(tree.path_scores[slot], score[path]) for slot, path in mine.items())
