"""Storage of a living tree: nodes as flat arrays, each known by a stable slot."""

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from outrider.speculation.tree import ROOT
from outrider.speculation.types import FloatArray, IntArray

Scalar = TypeVar("Scalar", bound=np.generic)

_FREE_DEPTH = -1
_FREE_KEY = np.iinfo(np.int64).min


class TreeSlots:
    """Fixed-capacity arrays of nodes with a free list. It knows no policy.

    Live read-only views by slot, in which only slots in use mean anything:
    tokens: int64 ``[capacity]``.
    parents: int64 ``[capacity]``, the parent's slot or ``ROOT``.
    depths: int64 ``[capacity]``, 1 for a child of the root; -1 where the slot is free.
    path_scores: float64 ``[capacity]``.
    births: int64 ``[capacity]``, one number per node ever placed, ascending; a removed
        node's stays readable until its slot is given away.
    """

    def __init__(self, capacity: int) -> None:
        """
        Raises:
            ValueError: the capacity is not positive.
        """
        if capacity < 1:
            raise ValueError(f"a tree needs room for at least one node, not {capacity}")
        self.capacity = capacity
        # One entry more than slots: the last one is the root, which ROOT (-1) indexes.
        size = capacity + 1
        self._tokens = np.zeros(size, np.int64)
        self._parents = np.full(size, ROOT, np.int64)
        self._depths = np.full(size, _FREE_DEPTH, np.int64)
        self._scores = np.zeros(size)
        self._births = np.full(size, -1, np.int64)
        self._keys = np.full(size, _FREE_KEY, np.int64)
        self._expanded = np.zeros(size, np.bool_)
        self._free = np.arange(capacity - 1, -1, -1)
        self._num_free = capacity
        self._next_birth = 0
        self._depths[ROOT] = 0
        self._scores[ROOT] = 1.0
        self.tokens, self.parents = _view(self._tokens), _view(self._parents)
        self.depths, self.path_scores = _view(self._depths), _view(self._scores)
        self.births = _view(self._births)

    def __len__(self) -> int:
        return self.capacity - self._num_free

    @property
    def storage(self) -> tuple[npt.NDArray[Any], ...]:
        """The arrays that native code works on; all but the free list end with the root.

        Tokens, parents, depths, births, keys, the free list, path scores, expanded.
        """
        whole = (self._tokens, self._parents, self._depths, self._births, self._keys)
        return (*whole, self._free, self._scores, self._expanded)

    @property
    def counters(self) -> tuple[int, int]:
        """How much of the free list counts, and the next birth; native code sets them anew."""
        return self._num_free, self._next_birth

    @counters.setter
    def counters(self, values: tuple[int, int]) -> None:
        self._num_free, self._next_birth = values

    @property
    def slots(self) -> IntArray:
        """int64 ``[len]``, ascending: the slots in use."""
        return (self._depths[:-1] >= 0).nonzero()[0]

    def _key(self, parents: IntArray, tokens: IntArray) -> IntArray:
        # Injective, for parents are in [-1, capacity).
        return tokens * (self.capacity + 1) + parents

    def _require_members(self, slots: IntArray) -> None:
        if slots.min() < ROOT or slots.max() >= self.capacity or self._depths[slots].min() < 0:
            known = set(self.slots.tolist()) | {ROOT}
            strangers = [slot for slot in slots.tolist() if slot not in known]
            raise ValueError(f"slots {strangers} are not in the tree")

    def _upcoming(self, count: int) -> IntArray:
        """The slots that the next ``count`` nodes will be placed in."""
        return self._free[self._num_free - count : self._num_free].copy()

    def _place(
        self, parents: IntArray, tokens: IntArray, depths: IntArray, path_scores: FloatArray, keys: IntArray
    ) -> IntArray:
        count = len(tokens)
        slots = self._upcoming(count)
        self._num_free -= count
        self._tokens[slots] = tokens
        self._parents[slots] = parents
        self._depths[slots] = depths
        self._scores[slots] = path_scores
        self._keys[slots] = keys
        self._births[slots] = np.arange(self._next_birth, self._next_birth + count)
        self._next_birth += count
        return slots

    def _release(self, slots: IntArray) -> None:
        self._depths[slots] = _FREE_DEPTH
        self._keys[slots] = _FREE_KEY
        self._expanded[slots] = False
        self._free[self._num_free : self._num_free + len(slots)] = slots
        self._num_free += len(slots)


def _view(values: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    view = values[:-1]
    view.flags.writeable = False
    return view
