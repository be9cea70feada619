"""The living tree against a dictionary of paths."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from outrider.speculation.living_tree import DROPPED, SMALLEST_SCORE, LivingTree
from outrider.speculation.tree import MAX_TREE_DEPTH, ROOT, Law

Path = tuple[int, ...]

# Few values, many of them halves, so that exact ties between unrelated nodes are common.
SCORES = [0.0, 0.25, 0.3, 0.5, 0.5, 0.5, 1.0, 1.0]
SEEDS = st.integers(0, 2**32 - 1)


class PathModel:
    """Paths of tokens with (score, age, slot, expanded); every operation by brute force."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.scores: dict[Path, float] = {}
        self.ages: dict[Path, int] = {}
        self.slots: dict[Path, int] = {(): ROOT}
        self.expanded: set[Path] = set()
        self.born = 0

    def rank(self, path: Path) -> tuple[float, int, int]:
        """Best first."""
        return (-self.scores.get(path, 1.0), len(path), self.ages.get(path, -1))

    def add(self, children: list[tuple[Path, int, float]]) -> list[Path]:
        """Returns each child's path; those not in ``scores`` afterwards were dropped."""
        paths = [(*parent, token) for parent, token, _ in children]
        for path, (parent, _, score) in zip(paths, children, strict=True):
            if path not in self.scores and len(path) <= MAX_TREE_DEPTH:
                self.scores[path] = max(self.scores.get(parent, 1.0) * score, SMALLEST_SCORE)
                self.ages[path] = self.born
                self.born += 1
        while len(self.scores) > self.capacity:
            self.remove(max((path for path in self.scores if not self.children(path)), key=self.rank))
        return paths

    def children(self, path: Path) -> list[Path]:
        return [each for each in self.scores if each[:-1] == path]

    def remove(self, path: Path) -> None:
        del self.scores[path], self.ages[path]
        self.slots.pop(path, None)
        self.expanded.discard(path)

    def clear(self) -> None:
        self.scores, self.ages, self.slots, self.expanded = {}, {}, {(): ROOT}, set()

    def reroot(self, tokens: Path) -> tuple[list[Path], bool]:
        prefixes = [tokens[: n + 1] for n in range(len(tokens))]
        found = [path for path in prefixes if path in self.scores]
        if len(found) < len(tokens):
            self.clear()
            return found, False
        cut, mass = len(tokens), self.scores.get(tokens, 1.0)
        below = [path for path in self.scores if path[:cut] == tokens and len(path) > cut]
        self.expanded = {path[cut:] for path in self.expanded if path[:cut] == tokens}
        self.slots = {(): ROOT} | {path[cut:]: self.slots[path] for path in below}
        self.ages = {path[cut:]: self.ages[path] for path in below}
        self.scores = {path[cut:]: self.scores[path] / mass for path in below}
        return found, True


class LivingTreeMachine(RuleBasedStateMachine):
    @initialize(capacity=st.sampled_from([1, 2, 5, 12, 40]))
    def start(self, capacity: int) -> None:
        self.tree = LivingTree(Law.COUPLED, capacity)
        self.model = PathModel(capacity)

    def members(self) -> list[Path]:
        return sorted(self.model.slots, key=lambda path: self.model.ages.get(path, -1))

    @rule(seed=SEEDS)
    def add(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        size = int(rng.integers(10))
        members = self.members()
        # Squared, so that young (mostly deep) nodes get more children.
        picks = [members[int((1 - rng.random() ** 2) * len(members) * 0.999)] for _ in range(size)]
        children = [(pick, int(rng.integers(4)), float(rng.choice(SCORES))) for pick in picks]
        parents = [self.model.slots[parent] for parent, _, _ in children]
        slots = self.tree.add(parents, [token for _, token, _ in children], [s for _, _, s in children])
        for path, slot in zip(self.model.add(children), slots.tolist(), strict=True):
            assert (slot == DROPPED) == (path not in self.model.scores)
            if slot != DROPPED:
                assert self.model.slots.setdefault(path, slot) == slot, "a slot moved"

    @rule(width=st.integers(0, 6), expand=st.booleans())
    def grow_frontier(self, width: int, expand: bool) -> None:
        growing = [p for p in self.members() if p not in self.model.expanded and len(p) < MAX_TREE_DEPTH]
        best = sorted(growing, key=self.model.rank)[:width]
        frontier = self.tree.frontier(width)
        assert frontier.tolist() == [self.model.slots[path] for path in best]
        if expand:
            self.tree.mark_expanded(frontier)
            self.model.expanded.update(best)

    @rule(budget=st.integers(0, 50), min_score=st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0]))
    def select(self, budget: int, min_score: float) -> None:
        best = sorted(self.model.scores, key=self.model.rank)[:budget]
        best = [path for path in best if self.model.scores[path] >= min_score]
        tree, slots = self.tree.select(budget, min_score)
        assert slots.tolist() == [self.model.slots[path] for path in best]
        assert tree.law is Law.COUPLED
        assert tree.scores.tolist() == [self.model.scores[path] for path in best]
        paths: list[Path] = []
        for token, parent in zip(tree.tokens.tolist(), tree.parent_indices.tolist(), strict=True):
            paths.append((*paths[parent], token) if parent >= 0 else (token,))
        assert paths == best

    @rule(seed=SEEDS, strangers=st.sampled_from([0, 0, 0, 1, 2]))
    def reroot(self, seed: int, strangers: int) -> None:
        rng = np.random.default_rng(seed)
        members = self.members()
        foreseen = members[int(rng.integers(len(members)))]
        tokens = (*foreseen[: int(rng.integers(1, 4))], *rng.integers(0, 4, strangers).tolist())
        before = dict(self.model.slots)
        found, survived = self.model.reroot(tokens)
        outcome = self.tree.reroot(tokens)
        assert outcome.path_slots.tolist() == [before[path] for path in found]
        assert (outcome.hits, outcome.misses) == (len(found), len(tokens) - len(found))
        assert outcome.survived is survived
        assert outcome.kept_slots.tolist() == sorted(set(self.model.slots.values()) - {ROOT})

    @precondition(lambda self: len(self.model.scores) > 8)
    @rule()
    def clear(self) -> None:
        self.tree.clear()
        self.model.clear()

    @invariant()
    def same_paths(self) -> None:
        assert len(self.tree) == len(self.model.scores)
        assert self.tree.slots.tolist() == sorted(set(self.model.slots.values()) - {ROOT})
        for path, score in self.model.scores.items():
            slot = self.model.slots[path]
            assert self.tree.tokens[slot] == path[-1]
            assert self.tree.parents[slot] == self.model.slots[path[:-1]]
            assert self.tree.depths[slot] == len(path)
            assert self.tree.path_scores[slot] == score


TestLivingTree = LivingTreeMachine.TestCase
TestLivingTree.settings = settings(
    max_examples=120, stateful_step_count=25, deadline=None, derandomize=True, database=None
)


@pytest.mark.parametrize("capacity", [12, 40, 100])
def test_long_lives_in_which_trees_get_deep(capacity: int) -> None:
    """The same rules, weighted so that most trees are deep, full and re-rooted time and again."""
    rng = np.random.default_rng(capacity)
    machine = LivingTreeMachine()
    machine.start(capacity)
    deepest = survivors = full = 0
    for _ in range(400):
        seed = int(rng.integers(2**32))
        machine.add(seed)
        machine.add(seed + 1)
        machine.grow_frontier(seed % 5, seed % 2 == 0)
        machine.select(seed % 60, float(rng.choice([0.0, 0.0, 0.3])))
        full += len(machine.tree) == capacity
        if rng.random() < 0.15:
            deepest = max(deepest, *map(len, machine.members()))
            machine.reroot(seed, int(rng.random() < 0.1))
            survivors += len(machine.tree) > 0
        machine.same_paths()
    assert survivors > 10
    assert deepest > 4
    assert full > 20


def chain(tree: LivingTree, length: int) -> list[int]:
    slots = [ROOT]
    for token in range(length):
        slots.append(int(tree.add([slots[-1]], [token], [0.9])[0]))
    return slots[1:]


def test_depth_is_bounded_and_the_deepest_are_no_frontier() -> None:
    tree = LivingTree(Law.DETERMINISTIC, 64)
    slots = chain(tree, MAX_TREE_DEPTH)
    tree.mark_expanded([ROOT, *slots[:-1]])
    assert tree.frontier(4).tolist() == []
    assert tree.add([slots[-1], ROOT], [7, 8], [1.0, 1.0]).tolist()[0] == DROPPED
    assert len(tree) == MAX_TREE_DEPTH + 1
    outcome = tree.reroot([0])
    assert outcome.survived
    assert tree.frontier(1).tolist() == [slots[-1]]
    assert tree.add([slots[-1]], [7], [1.0]).tolist() != [DROPPED]


def test_reroot_takes_over_the_expanded_flag() -> None:
    tree = LivingTree(Law.COUPLED)
    first, second = tree.add([ROOT, ROOT], [1, 2], [0.5, 0.25]).tolist()
    tree.mark_expanded([ROOT, first])
    below = tree.add([first], [3], [0.5]).tolist()
    outcome = tree.reroot([1])
    assert outcome.kept_slots.tolist() == below
    assert tree.path_scores[below].tolist() == [0.5]
    assert tree.frontier(9).tolist() == below
    assert second not in tree.slots
    assert tree.reroot([3]).survived
    assert tree.frontier(9).tolist() == [ROOT]


def test_an_alias_pushed_out_by_its_own_call_is_dropped() -> None:
    tree = LivingTree(Law.COUPLED, 2)
    low, _ = tree.add([ROOT, ROOT], [1, 2], [0.1, 0.9]).tolist()
    slots = tree.add([ROOT, ROOT, ROOT], [1, 3, 3], [1.0, 0.5, 0.7]).tolist()
    assert slots == [DROPPED, low, low]
    assert tree.tokens[low] == 3
    assert tree.path_scores[low] == 0.5


def test_underflow_keeps_scores_positive_and_rerooting_finite() -> None:
    tree = LivingTree(Law.COUPLED)
    top = tree.add([ROOT], [1], [0.0])
    leaf = tree.add(top, [2], [1e-300])
    assert tree.path_scores[leaf] > 0
    tree.reroot([1])
    assert tree.path_scores[leaf].tolist() == [1.0]


@pytest.mark.parametrize("score", [-0.1, 1.1, float("nan")])
def test_scores_must_be_probabilities(score: float) -> None:
    tree = LivingTree(Law.COUPLED)
    with pytest.raises(ValueError, match=r"not in \[0, 1\]"):
        tree.add([ROOT, ROOT], [1, 2], [0.5, score])
    assert len(tree) == 0


@pytest.mark.parametrize("stranger", [5, 512, 513, DROPPED])
def test_parents_must_be_in_the_tree(stranger: int) -> None:
    tree = LivingTree(Law.COUPLED)
    tree.add([ROOT], [1], [0.5])
    with pytest.raises(ValueError, match=rf"\[{stranger}\] are not in the tree"):
        tree.add([0, stranger], [1, 2], [0.5, 0.5])
    with pytest.raises(ValueError, match=rf"\[{stranger}\] are not in the tree"):
        tree.mark_expanded([stranger])
    assert len(tree) == 1


def test_malformed_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one node, not 0"):
        LivingTree(Law.COUPLED, 0)
    with pytest.raises(ValueError, match="differ"):
        LivingTree(Law.COUPLED).add([ROOT], [1, 2], [0.5, 0.5])


def test_views_are_read_only() -> None:
    tree = LivingTree(Law.COUPLED)
    for view in (tree.tokens, tree.parents, tree.depths, tree.path_scores):
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
    assert isinstance(tree.add([], [], []), np.ndarray)
