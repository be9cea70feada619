"""Where the next draft step goes: the most valuable nodes across all sessions of a worker."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from outrider.speculation.living_tree import LivingTree
from outrider.speculation.tree import ROOT
from outrider.speculation.types import IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Growable:
    """One session as the choice sees it.

    width: most nodes that one step expands. min_score: nodes below are not worth it.
    root_rows: rows that expanding the root takes, if it is not expanded.
    """

    tree: LivingTree
    width: int
    min_score: float
    root_rows: int


def choose_frontiers(sessions: Sequence[Growable], *, max_nodes: int, max_rows: int) -> list[IntArray]:
    """Slots to expand in one step, int64, per session (empty: it has to wait).

    max_nodes: nodes of all sessions together, beside roots. max_rows: of the forward.

    Path scores are what expanding a node gains, up to a factor that all share, so the best
    ones are taken wherever they are. Roots come first: without them nothing can be drafted,
    the one with the least text before it first, so that a long prompt delays nobody else.
    """
    frontiers = [_frontier(each) for each in sessions]
    at_root = [bool(len(each) and each[0] == ROOT) for each in frontiers]
    rows = _admit_roots(sessions, frontiers, at_root, max_rows)
    scores = [
        np.zeros(0) if root else session.tree.path_scores[frontier]
        for session, frontier, root in zip(sessions, frontiers, at_root, strict=True)
    ]
    room = max(0, min(max_nodes, max_rows - rows))
    everything = np.concatenate(scores) if scores else np.zeros(0)
    if len(everything) <= room:
        return frontiers
    taken = np.zeros(len(everything), np.bool_)
    taken[np.argsort(-everything, kind="stable")[:room]] = True
    ends = np.cumsum([len(each) for each in scores])
    return [
        frontier if root else frontier[taken[end - len(frontier) : end]]
        for frontier, root, end in zip(frontiers, at_root, ends, strict=True)
    ]


def is_exhausted(session: Growable) -> bool:
    """Whether nothing of a session is worth expanding before the next commit."""
    return not len(_frontier(session))


def _frontier(session: Growable) -> IntArray:
    frontier = session.tree.frontier(session.width)
    if len(frontier) and frontier[0] == ROOT:
        return frontier[:1]
    return frontier[session.tree.path_scores[frontier] >= session.min_score]


def _admit_roots(
    sessions: Sequence[Growable], frontiers: list[IntArray], at_root: list[bool], max_rows: int
) -> int:
    """Empties the frontiers of roots that do not fit; returns the rows of those that do."""
    rows = 0
    waiting = [index for index, root in enumerate(at_root) if root]
    for index in sorted(waiting, key=lambda index: sessions[index].root_rows):
        # A text longer than a whole forward goes in pieces, each as large as there is room.
        if rows < max_rows and (rows + sessions[index].root_rows <= max_rows or rows == 0):
            rows += min(sessions[index].root_rows, max_rows)
        else:
            frontiers[index] = frontiers[index][:0]
    return rows
