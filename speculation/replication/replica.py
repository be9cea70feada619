"""The target's end of one generation: a drafter's growth becomes nodes of the target's tree.

All of it is array work on a batch of messages: O(new nodes), never a Python loop over them. Where
the native module was built, it does the same in one call, but for what it leaves to the arrays.
Nothing that arrives is trusted, and what cannot be placed is dropped and counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from outrider.kernels.native import library
from outrider.speculation.living_tree import SMALLEST_SCORE, LivingTree, Reroot
from outrider.speculation.replication.messages import ROOT_ID, Growth
from outrider.speculation.replication.text import CommittedText
from outrider.speculation.tree import MAX_TREE_DEPTH, ROOT
from outrider.speculation.types import BoolArray, FloatArray, IntArray

if TYPE_CHECKING:
    from outrider.kernels.native._replication import Grafter

WINDOW = 8192
"""Ids of a generation that are remembered; growth below older ones is dropped."""
MAX_ALIASES = 1024
"""Committed nodes that are remembered until their commit is acknowledged."""
GONE = -2
"""In place of a slot: the parent has left the tree."""
NO_POSITION = -1


class GapError(Exception):
    """Growth is missing, or makes no sense: the generation is over."""


@dataclass(frozen=True, slots=True)
class Placed:
    """What became of a batch's nodes: ``nodes`` in all, of which some were stale."""

    nodes: int
    stale: int


class Replica:
    """Places growth of one generation of one drafter in ``tree``.

    An id stands for a slot, told apart from later nodes in the same slot by its birth, or
    for a position: a committed node remains the parent of growth that crossed its commit on
    the wire. Such growth is walked down the committed tokens, and what agrees is kept.
    """

    def __init__(self, tree: LivingTree, text: CommittedText, vocab_size: int) -> None:
        self.tree, self.text, self.vocab_size = tree, text, vocab_size
        self.seen_commit = 0
        self._next_id = ROOT_ID + 1
        self._slots = np.full(WINDOW, GONE)
        self._births = np.zeros(WINDOW, np.int64)
        self._positions = np.full(WINDOW, NO_POSITION)
        # Ascending: whatever is committed later lies below, and is younger.
        self._committed_births = np.zeros(0, np.int64)
        self._committed_positions = np.zeros(0, np.int64)
        self._grafter = library.grafter(
            Growth,
            tree.storage,
            (self._slots, self._births, self._positions),
            vocab_size=vocab_size,
            max_depth=MAX_TREE_DEPTH,
            smallest_score=SMALLEST_SCORE,
        )

    def apply(self, messages: list[Growth]) -> Placed:
        """Adds what the messages brought, in order.

        Raises:
            GapError: a message is missing, or tokens or positions are impossible.
        """
        placed = None if self._grafter is None else self._apply_natively(self._grafter, messages)
        return self._apply_by_arrays(messages) if placed is None else placed

    def _apply_natively(self, grafter: "Grafter", messages: list[Growth]) -> Placed | None:
        """None, and nothing has changed, if two nodes are one or the messages make no sense."""
        done = grafter.place(
            messages,
            self._next_id,
            *self.tree.counters,
            self.text.ids,
            self._committed_births,
            self._committed_positions,
        )
        if done is None:
            return None
        nodes, stale, num_free, next_birth, last = done
        self._next_id += nodes
        self.tree.counters = num_free, next_birth
        if last is not None:
            self._forget_acknowledged(last)
        return Placed(nodes, stale)

    def _apply_by_arrays(self, messages: list[Growth]) -> Placed:
        fresh = [message for message in messages if self._is_next(message)]
        if not fresh:
            return Placed(0, 0)
        forest = _Forest.of(fresh)
        first = self._next_id - len(forest.tokens)
        self._require_possible(forest, first)
        self._resolve(forest, first)
        self._walk(forest)
        slots = self._graft(forest)
        self._remember(forest, slots)
        self._forget_acknowledged(fresh[-1])
        stale = int(np.count_nonzero(forest.parents == GONE))
        return Placed(len(slots), stale)

    def committed(self, reroot: Reroot) -> None:
        """Keeps the ids of newly committed nodes as aliases of their positions.

        Call it right after the re-root of the tree and the append to the text.
        """
        path = reroot.path_slots
        if len(path):
            before = self.text.length - reroot.num_committed
            positions = before + 1 + np.arange(len(path))
            births = np.concatenate((self._committed_births, self.tree.births[path]))
            self._committed_births = births[-MAX_ALIASES:]
            positions = np.concatenate((self._committed_positions, positions))
            self._committed_positions = positions[-MAX_ALIASES:]

    def _is_next(self, message: Growth) -> bool:
        """Whether the message continues what came so far; an old one once more does not."""
        if message.first_id > self._next_id:
            raise GapError(f"growth starts with node {message.first_id}, not {self._next_id}")
        if message.first_id < self._next_id:
            return False
        self._next_id += len(message.tokens)
        return True

    def _require_possible(self, forest: "_Forest", first: int) -> None:
        if (forest.parents >= np.arange(first, self._next_id)).any():
            raise GapError(f"nodes from {first} on hang below later ones: {forest.parents}")
        if len(forest.tokens) and not 0 <= forest.tokens.min() <= forest.tokens.max() < self.vocab_size:
            raise GapError(f"token {forest.tokens.max()} is not in the vocabulary of {self.vocab_size}")
        if forest.base_lengths.max(initial=0) > self.text.length:
            raise GapError(f"the drafter knows {forest.base_lengths.max()} of {self.text.length} tokens")

    def _resolve(self, forest: "_Forest", first: int) -> None:
        """From parents' ids to slots, positions, and indices within the batch."""
        ids = forest.parents
        forest.inside = np.where(ids >= first, ids - first, -1)
        at = ids % WINDOW
        known = (ids >= first - WINDOW) & (forest.inside < 0) & (ids != ROOT_ID)
        slots = np.where(known, self._slots[at], GONE)
        positions = np.where(known, self._positions[at], NO_POSITION)
        positions[ids == ROOT_ID] = forest.base_lengths[ids == ROOT_ID]
        births = self._births[at]
        alive = (slots >= 0) & (self.tree.depths[slots] > 0) & (self.tree.births[slots] == births)
        departed = np.flatnonzero((slots >= 0) & ~alive)
        if len(departed):
            positions[departed] = self._position_of(births[departed])
        forest.parents = np.where(alive, slots, GONE)
        forest.positions = positions
        self._settle(forest, np.ones(len(ids), np.bool_))

    def _position_of(self, births: IntArray) -> IntArray:
        """Where nodes that were committed stand; ``NO_POSITION`` for others."""
        if not len(self._committed_births):
            return np.full(len(births), NO_POSITION)
        at = np.minimum(np.searchsorted(self._committed_births, births), len(self._committed_births) - 1)
        same = self._committed_births[at] == births
        return np.where(same, self._committed_positions[at], NO_POSITION)

    def _settle(self, forest: "_Forest", which: BoolArray) -> None:
        """Nodes whose parent is the last committed token hang below the root."""
        forest.parents[which & (forest.positions == self.text.length)] = ROOT

    def _walk(self, forest: "_Forest") -> None:
        """Follows growth from before the last commits down the committed tokens."""
        own = np.full(len(forest.tokens), NO_POSITION)
        forest.own_positions = own
        text, length = self.text.ids, self.text.length
        behind = (forest.positions >= 0) & (forest.positions < length)
        while behind.any():
            agrees = behind & (forest.tokens == text[np.minimum(forest.positions, length - 1)])
            own[agrees] = forest.positions[agrees] + 1
            children = (forest.inside >= 0) & agrees[forest.inside]
            forest.positions[children] = own[forest.inside[children]]
            forest.inside[children] = -1
            self._settle(forest, children)
            behind = children & (forest.positions < length)

    def _graft(self, forest: "_Forest") -> IntArray:
        """Slots of all nodes, ``GONE`` or dropped for those that found no place."""
        slots = np.full(len(forest.tokens), GONE)
        lost = _with_descendants((forest.inside < 0) & (forest.parents == GONE), forest.inside)
        forest.parents[lost & (forest.own_positions < 0)] = GONE
        rows = np.flatnonzero(~lost)
        if len(rows):
            index = np.full(len(slots) + 1, -1)
            index[rows] = np.arange(len(rows))
            inside = index[forest.inside[rows]]
            parents = np.where(inside >= 0, ROOT, forest.parents[rows])
            forest.parents[rows] = parents
            slots[rows] = self.tree.graft(parents, inside, forest.tokens[rows], forest.scores[rows])
        forest.parents[forest.own_positions >= 0] = ROOT
        return slots

    def _remember(self, forest: "_Forest", slots: IntArray) -> None:
        ids = np.arange(self._next_id - len(slots), self._next_id)[-WINDOW:] % WINDOW
        slots, positions = slots[-WINDOW:], forest.own_positions[-WINDOW:]
        self._slots[ids] = slots
        self._births[ids] = self.tree.births[slots]
        self._positions[ids] = positions

    def _forget_acknowledged(self, last: Growth) -> None:
        """The drafter names committed nodes no more once it has re-rooted its own tree."""
        self.seen_commit = max(self.seen_commit, last.seen_commit)
        keep = self._committed_positions.searchsorted(last.base_length)
        if keep:
            self._committed_births = self._committed_births[keep:]
            self._committed_positions = self._committed_positions[keep:]


@dataclass(slots=True)
class _Forest:
    """The nodes of several messages behind one another, all arrays ``[nodes]``.

    parents: ids at first, then slots, ``ROOT`` or ``GONE``. inside: the parent's index in the
    forest, or -1. positions: of the parent, where it is a committed token. own_positions: of
    the node itself, where it turned out to be one.
    """

    parents: IntArray
    tokens: IntArray
    scores: FloatArray
    base_lengths: IntArray
    inside: IntArray
    positions: IntArray
    own_positions: IntArray

    @classmethod
    def of(cls, messages: Sequence[Growth]) -> "_Forest":
        none = np.zeros(0, np.int64)
        lengths = [message.base_length for message in messages]
        return cls(
            parents=np.concatenate([message.parents for message in messages]),
            tokens=np.concatenate([message.tokens for message in messages]),
            scores=np.concatenate([message.scores for message in messages]).astype(np.float64),
            base_lengths=np.repeat(lengths, [len(message.tokens) for message in messages]),
            inside=none,
            positions=none,
            own_positions=none,
        )


def _with_descendants(marked: BoolArray, inside: IntArray) -> BoolArray:
    """The marked nodes of a forest and all below them."""
    jump = inside
    if not marked.any():
        return marked
    while (far := np.flatnonzero(jump >= 0)).size:
        marked = marked.copy()
        marked[far] |= marked[jump[far]]
        above = jump.copy()
        above[far] = jump[jump[far]]
        jump = above
    return marked
