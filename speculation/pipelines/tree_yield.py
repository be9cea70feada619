"""What draft trees promise, and how far that can be believed, learnt from the trees themselves."""

import numpy as np

from outrider.speculation.living_tree import LivingTree
from outrider.speculation.pipelines.shape import MAX_VERIFIED_NODES
from outrider.speculation.tree import MAX_TREE_DEPTH, ROOT
from outrider.speculation.types import FloatArray, IntArray

LEARNING_RATE = 0.05
"""Weight of one round in the running estimates."""
FORGETTING = 0.005
"""How fast estimates that are not used return to where they are tried again."""
FIRST_CHANCE = 0.8
"""Assumed chance that a guess is right, before any was judged."""
MOST_TRUST = 2.0


class TreeYield:
    """Accepted tokens to expect of a tree by draft steps taken and nodes verified.

    Path scores say which nodes are worth their rows; how many tokens come of it is measured.
    A drafter is not trusted with more: one that overstates its scores loses its credit.
    """

    def __init__(self) -> None:
        depths = np.arange(MAX_TREE_DEPTH + 1)
        chain = np.minimum(depths[:, None], np.arange(MAX_VERIFIED_NODES + 1))
        reached = np.concatenate(([0.0], np.cumsum(FIRST_CHANCE ** depths[1:])))
        self._prior: FloatArray = reached[np.minimum(chain, MAX_TREE_DEPTH)]
        self._promised = self._prior.copy()
        self._expected = self._accepted = 1.0

    @property
    def trust(self) -> float:
        """Accepted tokens over promised ones."""
        return min(MOST_TRUST, self._accepted / max(self._expected, 1e-9))

    def tokens(self, steps: int, nodes: int) -> FloatArray:
        """Expected accepted tokens ``[steps + 1, nodes + 1]``, from none of either on."""
        return self.trust * self._promised[: steps + 1, : nodes + 1]

    def observe_tree(self, tree: LivingTree, width: int, steps: int) -> None:
        """What a round of so many draft steps, ``width`` nodes expanded in each, has led to."""
        steps = min(steps, MAX_TREE_DEPTH)
        slots = tree.slots
        slots = slots[np.argsort(-tree.path_scores[slots], kind="stable")][:MAX_VERIFIED_NODES]
        there = births(tree, slots, width, steps) <= np.arange(steps + 1)[:, None]
        promised = np.zeros((steps + 1, MAX_VERIFIED_NODES))
        scores = -np.sort(-np.where(there, tree.path_scores[slots], 0.0), axis=1)
        promised[:, : len(slots)] = scores
        promised = np.cumsum(promised, axis=1)
        # Nobody knows what more steps would have brought: as much as the last one, less and less.
        last = promised[-1] - promised[-2]
        further = np.cumsum(FIRST_CHANCE ** np.arange(1, MAX_TREE_DEPTH + 1 - steps))
        promised = np.concatenate((promised, promised[-1] + further[:, None] * last))
        self._promised[:, 1:] += LEARNING_RATE * (promised - self._promised[:, 1:])

    def observe_verdict(self, expected: float, accepted: int) -> None:
        """A verification of nodes whose path scores sum up to ``expected``."""
        self._expected += LEARNING_RATE * (expected - self._expected)
        self._accepted += LEARNING_RATE * (accepted - self._accepted)

    def forget_a_little(self, share: float = FORGETTING) -> None:
        """After a step without drafting: what made it unattractive may have changed."""
        self._promised += share * (self._prior - self._promised)
        self.forgive_a_little(share)

    def forgive_a_little(self, share: float = FORGETTING) -> None:
        """After a step that verified nothing, by which no credit can be earned."""
        self._expected += share * (1.0 - self._expected)
        self._accepted += share * (1.0 - self._accepted)


def births(tree: LivingTree, slots: IntArray, width: int, steps: int) -> IntArray:
    """After about how many of a round's draft steps each of these nodes was there, int64 ``[n]``.

    slots: ``[n]``, best first. Best-first growth expands the root, then the ``width`` best nodes at
    a time; what that would have taken more than ``steps`` for was left by the round before.
    """
    if not len(slots):
        return np.zeros(0, np.int64)
    parents = tree.parents[slots]
    expanded, owner = np.unique(parents, return_inverse=True)
    scores = np.where(expanded == ROOT, 2.0, tree.path_scores[expanded])
    rank = np.empty(len(expanded), np.int64)
    rank[np.argsort(-scores, kind="stable")] = np.arange(len(expanded))
    born = np.maximum(tree.depths[slots], 1 + (rank[owner] + width - 1) // width)
    result: IntArray = np.maximum(born - max(0, int(born.max()) - steps), 0)
    return result
