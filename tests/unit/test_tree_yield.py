"""What trees promise by draft steps and nodes, and how much of it is believed."""

import numpy as np
import pytest

from outrider.speculation.living_tree import LivingTree
from outrider.speculation.pipelines.tree_yield import MOST_TRUST, TreeYield, births
from outrider.speculation.tree import ROOT, Law


def grown(steps: int, width: int, *, chance: float = 0.6) -> tuple[LivingTree, dict[int, int]]:
    """A tree of best-first growth, and after which step each slot was there."""
    tree, born, expanded = LivingTree(Law.COUPLED), dict[int, int](), set[int]()
    for step in range(1, steps + 1):
        if step == 1:
            parents = [ROOT]
        else:
            open_slots = [int(slot) for slot in tree.slots if int(slot) not in expanded]
            parents = sorted(open_slots, key=lambda slot: (-tree.path_scores[slot], slot))[:width]
        expanded |= set(parents)
        for parent in parents:
            slots = tree.add([parent] * 2, [1, 2], [chance, 0.9 * (1 - chance)])
            born |= {int(slot): step for slot in slots}
    return tree, born


def best_first(tree: LivingTree) -> np.ndarray:
    return tree.slots[np.argsort(-tree.path_scores[tree.slots], kind="stable")]


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_births_are_the_steps_of_best_first_growth(width: int, steps: int) -> None:
    tree, born = grown(steps, width)
    slots = best_first(tree)
    error = births(tree, slots, width, steps) - [born[int(slot)] for slot in slots]
    # The first steps may have fewer nodes to expand than they could, which is not accounted for.
    assert abs(error).max() <= (0 if width <= 2 else 1)
    assert np.count_nonzero(error) <= 0.1 * len(slots)


def test_what_a_round_found_there_was_born_before_it() -> None:
    tree, _ = grown(3, 1)
    slots = best_first(tree)
    found = births(tree, slots, 1, 1)
    assert set(found.tolist()) == {0, 1}
    assert (found == 1).sum() == 2, "the last step's children alone are new"
    assert not births(tree, slots[:0], 1, 1).size


def test_promises_follow_the_trees() -> None:
    trees = TreeYield()
    tree, born = grown(3, 2)
    for _ in range(200):
        trees.observe_tree(tree, 2, 3)
    promised = trees.tokens(3, 16) / trees.trust
    for steps in range(4):
        scores = sorted(
            (float(tree.path_scores[slot]) for slot, at in born.items() if at <= steps), reverse=True
        )
        for nodes in range(17):
            assert promised[steps, nodes] == pytest.approx(sum(scores[:nodes]), rel=1e-3, abs=1e-3)


def test_more_steps_than_were_taken_are_expected_to_bring_less_and_less() -> None:
    trees = TreeYield()
    tree, _ = grown(3, 2)
    for _ in range(200):
        trees.observe_tree(tree, 2, 3)
    gains = np.diff(trees.tokens(8, 16)[:, 16])
    assert (gains[3:] > 0).all()
    assert (np.diff(gains[2:]) < 0).all()


def test_a_drafter_that_overstates_loses_its_credit_and_may_earn_it_again() -> None:
    trees = TreeYield()
    for _ in range(100):
        trees.observe_verdict(expected=5.0, accepted=0)
    assert trees.trust < 0.01
    assert trees.tokens(4, 8).max() < 0.05
    for _ in range(300):
        trees.forget_a_little()
    assert trees.trust > 0.1, "it is tried again"
    for _ in range(200):
        trees.observe_verdict(expected=2.0, accepted=2)
    assert trees.trust == pytest.approx(1.0, rel=0.01)
    for _ in range(200):
        trees.observe_verdict(expected=0.0, accepted=5)
    assert trees.trust == MOST_TRUST


def test_before_anything_was_seen_a_chain_is_expected() -> None:
    tokens = TreeYield().tokens(3, 4)
    assert tokens[0].tolist() == [0.0] * 5
    assert tokens[3].tolist() == pytest.approx([0, 0.8, 0.8 + 0.64, 0.8 + 0.64 + 0.512, 0.8 + 0.64 + 0.512])
    assert tokens[1].tolist() == pytest.approx([0, 0.8, 0.8, 0.8, 0.8])
