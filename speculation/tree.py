"""The draft tree: candidate continuations of one request, as flat arrays."""

import enum
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt

ROOT = -1
"""Parent index of the nodes right below the root, the last committed token."""

MAX_TREE_DEPTH = 32
"""Deepest node that one verification takes; canonical attention relies on it."""


class Law(enum.Enum):
    """How the siblings of a tree came about, which decides what rules are exact for it."""

    SAMPLED_WR = "sampled_with_replacement"
    SAMPLED_WOR = "sampled_without_replacement"
    DETERMINISTIC = "deterministic"
    COUPLED = "coupled"


@dataclass(frozen=True, kw_only=True, eq=False)
class DraftTree:
    """An immutable tree in topological order (every parent stands before its children).

    tokens: int64 ``[nodes]``.
    parent_indices: int64 ``[nodes]``, ``ROOT`` or the index of an earlier node.
    scores: float64 ``[nodes]``, estimated probability that the target takes the whole
        path to the node; never greater than the parent's.
    law: how siblings were produced.

    Raises:
        ValueError: shapes differ, a parent does not stand before its child, or a path is
            deeper than ``MAX_TREE_DEPTH``.
    """

    tokens: npt.NDArray[np.int64]
    parent_indices: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    law: Law
    depths: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        nodes = len(self.tokens)
        if self.parent_indices.shape != (nodes,) or self.scores.shape != (nodes,):
            raise ValueError(
                f"a tree of {nodes} tokens has {self.parent_indices.shape} parents "
                f"and {self.scores.shape} scores"
            )
        late = (self.parent_indices < ROOT) | (self.parent_indices >= np.arange(nodes))
        if late.any():
            node = int(late.argmax())
            raise ValueError(f"parent {self.parent_indices[node]} of node {node} is not an earlier node")
        object.__setattr__(self, "depths", self.ancestor_mask.sum(axis=1))
        if nodes and self.depths.max() > MAX_TREE_DEPTH:
            raise ValueError(f"a path has {self.depths.max()} nodes, more than {MAX_TREE_DEPTH}")

    @classmethod
    @cache
    def empty(cls, law: Law = Law.DETERMINISTIC) -> "DraftTree":
        """A tree without nodes: verifying it is one step of plain decoding."""
        none = np.zeros(0, np.int64)
        return cls(tokens=none, parent_indices=none, scores=np.zeros(0), law=law)

    @classmethod
    def chain(cls, tokens: npt.ArrayLike, law: Law, scores: npt.ArrayLike | None = None) -> "DraftTree":
        """A single path."""
        ids = np.asarray(tokens, np.int64)
        return cls(
            tokens=ids,
            parent_indices=np.arange(-1, len(ids) - 1),
            scores=np.ones(len(ids)) if scores is None else np.asarray(scores, np.float64),
            law=law,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def row_depths(self) -> npt.NDArray[np.int64]:
        """int64 ``[1 + nodes]``: 0 for the root, then the nodes' depths."""
        return np.concatenate((np.zeros(1, np.int64), self.depths))

    @cached_property
    def ancestor_mask(self) -> npt.NDArray[np.bool_]:
        """Bool ``[nodes, nodes]``: row i marks node i and its ancestors (the root is not a node)."""
        nodes = len(self.tokens)
        mask = np.eye(nodes, dtype=np.bool_)
        inside = self.parent_indices >= 0
        # Pointer jumping: after round k a row holds 2**k generations.
        jump = np.where(inside, self.parent_indices, np.arange(nodes))
        while True:
            wider = mask | mask[jump]
            if np.array_equal(wider, mask):
                return mask
            mask, jump = wider, jump[jump]
