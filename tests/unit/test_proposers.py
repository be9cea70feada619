"""Who proposed a node, told from when it was born."""

from collections import Counter

import numpy as np
import pytest

from outrider.speculation.living_tree import LivingTree
from outrider.speculation.proposers import MANY, Proposers
from outrider.speculation.tree import ROOT, Law


@pytest.mark.parametrize("seed", range(5))
def test_every_node_is_its_first_proposer_s(seed: int) -> None:
    """Also of a tree that has moved on time and again, for which little is remembered."""
    rng = np.random.default_rng(seed)
    tree, proposers = LivingTree(Law.COUPLED, 40), Proposers()
    authors: dict[int, str] = {}
    for _ in range(400):
        name = str(rng.choice(["a", "b", "c"]))
        before = tree.counters[1]
        proposers.note(before, name)
        parent = int(rng.choice(np.append(tree.slots, ROOT)))
        slots = tree.add([parent, parent], rng.permutation(4)[:2], rng.random(2))
        for slot in slots[slots >= 0]:
            if tree.births[slot] >= before:
                authors[int(tree.births[slot])] = name
        if rng.random() < 0.3:
            below = tree.slots[tree.depths[tree.slots] == 1]
            tree.reroot([int(tree.tokens[rng.choice(below)])] if len(below) else [0])
            proposers.keep_from(tree)
        births = tree.births[tree.slots]
        assert proposers.count(births) == Counter(authors[birth] for birth in births.tolist())
        for birth in births[-3:]:
            assert proposers.count(np.array([birth])) == {authors[int(birth)]: 1}
    assert len(proposers._names) <= MANY + 40


def test_one_proposer_takes_one_entry() -> None:
    proposers = Proposers()
    for birth in range(100):
        proposers.note(birth, "only")
    assert proposers.count(np.array([0, 50, 99])) == {"only": 3}
    assert proposers.count(np.zeros(0, np.int64)) == {}
    assert len(proposers._names) == 1


def test_who_was_announced_and_brought_nothing_has_proposed_nothing() -> None:
    proposers = Proposers()
    for birth, name in ((0, "a"), (3, "b"), (3, "c"), (3, "a"), (5, "b")):
        proposers.note(birth, name)
    assert proposers.count(np.arange(7)) == {"a": 5, "b": 2}
    assert [proposers.count(np.array([birth])) for birth in (4, 5)] == [{"a": 1}, {"b": 1}]
