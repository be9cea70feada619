"""Where a draft step goes, across sessions."""

from collections.abc import Sequence

import numpy as np
import pytest

from outrider.speculation.growth import Growable, choose_frontiers, is_exhausted
from outrider.speculation.living_tree import LivingTree
from outrider.speculation.tree import ROOT, Law


def fresh(root_rows: int = 1) -> Growable:
    """A session whose root is not expanded."""
    return Growable(tree=LivingTree(Law.COUPLED, 32), width=4, min_score=0.0, root_rows=root_rows)


def grown(scores: Sequence[float], *, width: int = 8, min_score: float = 0.0) -> Growable:
    """A session whose root has children 0, 1, ... of these scores."""
    tree = LivingTree(Law.COUPLED, 32)
    tree.mark_expanded([ROOT])
    tree.add(np.full(len(scores), ROOT), np.arange(len(scores)), scores)
    return Growable(tree=tree, width=width, min_score=min_score, root_rows=0)


def chosen(sessions: Sequence[Growable], *, max_nodes: int = 16, max_rows: int = 64) -> list[list[int]]:
    """Tokens of the chosen nodes, ascending, or ``[ROOT]``."""
    frontiers = choose_frontiers(sessions, max_nodes=max_nodes, max_rows=max_rows)
    return [
        sorted(ROOT if slot == ROOT else int(session.tree.tokens[slot]) for slot in slots.tolist())
        for session, slots in zip(sessions, frontiers, strict=True)
    ]


def test_no_sessions() -> None:
    assert chosen([]) == []


def test_all_go_where_there_is_room() -> None:
    assert chosen([fresh(), grown([0.5, 0.25]), fresh(9)]) == [[ROOT], [0, 1], [ROOT]]


def test_roots_are_admitted_shortest_first() -> None:
    sessions = [fresh(40), fresh(3), fresh(30), fresh(31)]
    assert chosen(sessions) == [[], [ROOT], [ROOT], [ROOT]]
    assert chosen(sessions, max_rows=63) == [[], [ROOT], [ROOT], []]


def test_a_text_longer_than_a_forward_goes_alone_and_in_pieces() -> None:
    assert chosen([fresh(1000)]) == [[ROOT]]
    assert chosen([fresh(1000), fresh(2)]) == [[], [ROOT]]
    assert chosen([fresh(1000), fresh(1001), grown([0.5])]) == [[ROOT], [], []]


def test_roots_leave_the_rest_of_the_forward_to_nodes() -> None:
    assert chosen([fresh(62), grown([0.5, 0.9, 0.7])]) == [[ROOT], [1, 2]]
    assert chosen([fresh(64), grown([0.5, 0.9, 0.7])]) == [[ROOT], []]


def test_nodes_are_taken_by_score_wherever_they_are() -> None:
    sessions = [grown([0.9, 0.1]), grown([0.2, 0.8, 0.3]), fresh(), grown([])]
    assert chosen(sessions, max_nodes=3) == [[0], [1, 2], [ROOT], []]
    assert chosen(sessions, max_nodes=1) == [[0], [], [ROOT], []]
    assert chosen(sessions, max_nodes=0) == [[], [], [ROOT], []]


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_by_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sessions = [grown(rng.random(int(rng.integers(0, 9))).tolist()) for _ in range(5)]
    budget = int(rng.integers(0, 30))
    everything = sorted(
        (-float(each.tree.path_scores[slot]), index, int(each.tree.tokens[slot]))
        for index, each in enumerate(sessions)
        for slot in each.tree.slots.tolist()
    )[:budget]
    taken = chosen(sessions, max_nodes=budget)
    assert [(index, token) for index, tokens in enumerate(taken) for token in tokens] == sorted(
        (index, token) for _, index, token in everything
    )


def test_width_bounds_what_one_session_expands() -> None:
    assert chosen([grown([0.1, 0.9, 0.5, 0.6], width=2)]) == [[1, 3]]


def test_nodes_below_the_least_score_wait_for_better_times() -> None:
    session = grown([0.5, 0.04, 0.05], min_score=0.05)
    assert chosen([session]) == [[0, 2]]
    assert not is_exhausted(session)
    session.tree.mark_expanded(session.tree.frontier(2))
    assert is_exhausted(session)
    assert chosen([session]) == [[]]


def test_an_unexpanded_root_is_never_too_unlikely() -> None:
    session = Growable(tree=LivingTree(Law.COUPLED), width=1, min_score=1.0, root_rows=5)
    assert not is_exhausted(session)
    assert chosen([session]) == [[ROOT]]


def test_a_root_that_comes_with_old_nodes_goes_first_and_alone() -> None:
    session = grown([0.5, 0.9])
    session.tree.reroot([1])
    assert chosen([session]) == [[ROOT]]
