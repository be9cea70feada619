"""The living draft tree of one request: a drafter grows it, a verification prunes it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outrider.speculation.tree import MAX_TREE_DEPTH, ROOT, DraftTree, Law
from outrider.speculation.tree_slots import TreeSlots
from outrider.speculation.types import BoolArray, FloatArray, IntArray

DROPPED = -2
"""In place of a slot: the node is not in the tree (too deep, or pushed out by better ones)."""

DEFAULT_CAPACITY = 512
_NONE: IntArray = np.zeros(0, np.int64)
SMALLEST_SCORE = 1e-30
"""Floor of path scores: dividing by a new root's score stays safe and keeps the order."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reroot:
    """What became of a tree when tokens were committed.

    path_slots: int64 ``[hits]``, the slots that became committed, from the root downwards.
    kept_slots: int64 ``[kept]``, ascending, the slots that live on below the new root.
    num_committed: tokens that were committed.

    Every other slot is free again; the slots of the path are free too.
    """

    path_slots: IntArray
    kept_slots: IntArray
    num_committed: int

    @property
    def hits(self) -> int:
        """Committed tokens that the tree had foreseen."""
        return len(self.path_slots)

    @property
    def misses(self) -> int:
        """Committed tokens that it had not."""
        return self.num_committed - self.hits

    @property
    def survived(self) -> bool:
        """Whether the tree had foreseen everything, so that its subtree lives on."""
        return self.misses == 0


class LivingTree(TreeSlots):
    """A mutable tree below the last committed token, as arrays of fixed capacity.

    A node is known by its slot, which stays the same until the node is removed; then it may
    be given to another node. Path scores are products of conditional scores, so they never
    increase downwards: the best nodes are a connected tree (OPT-Tree, Wang et al.) and the
    worst ones can go without orphaning any. Parents are older than their children, hence
    "best score first, then smaller depth, then older" puts every parent before its children.

    Not thread-safe: one owner per tree.
    """

    def __init__(self, law: Law, capacity: int = DEFAULT_CAPACITY) -> None:
        """
        Raises:
            ValueError: the capacity is not positive.
        """
        super().__init__(capacity)
        self.law = law

    def add(self, parents: npt.ArrayLike, tokens: npt.ArrayLike, scores: npt.ArrayLike) -> IntArray:
        """Adds ``k`` nodes and returns their slots, int64 ``[k]``.

        parents: int ``[k]``, slots in the tree, or ``ROOT``; not nodes of this same call.
        tokens: int ``[k]``, token ids (below 2**31).
        scores: float ``[k]``, in [0, 1]: probability of the token given its parent.

        A second child with the same (parent, token) is an alias of the first, whose slot is
        returned and whose score stays. When room is short, the nodes with the lowest path
        score go (ties: deeper, then younger first), old or new; their slots may be reused at
        once. A node that is not in the tree afterwards has ``DROPPED`` in place of a slot.

        Raises:
            ValueError: lengths differ, a score is no probability or a parent is not in the tree.
        """
        above = np.asarray(parents, np.int64)
        ids = np.asarray(tokens, np.int64)
        chances = np.asarray(scores, np.float64)
        if not (above.ndim == 1 and above.shape == ids.shape == chances.shape):
            raise ValueError(f"{above.shape} parents, {ids.shape} tokens and {chances.shape} scores differ")
        if not len(ids):
            return above
        if not (chances.min() >= 0.0 and chances.max() <= 1.0):
            raise ValueError(f"scores {chances[~((chances >= 0) & (chances <= 1))]} are not in [0, 1]")
        self._require_members(above)
        keys = self._key(above, ids)
        aliases = self._keys == keys[:, None]
        if aliases.any() or len(set(keys.tolist())) < len(ids):
            return self._add_with_aliases(above, ids, chances, keys, aliases)
        return self._add_distinct(above, ids, chances, keys)

    def graft(self, parents: IntArray, inside: IntArray, tokens: IntArray, scores: FloatArray) -> IntArray:
        """``add`` for a whole forest at once: a parent may be a node of this same call.

        parents: int64 ``[k]``, slots or ``ROOT``; ``ROOT`` where ``inside`` says more.
        inside: int64 ``[k]``, the index in this call of the parent, which stands earlier, or -1.
        tokens, scores: as for ``add``, but checked by the caller.

        Returns slots, int64 ``[k]``; the descendants of a dropped node are dropped.
        """
        inner = inside >= 0
        if self._has_aliases(parents, inside, inner, tokens):
            return self._graft_by_levels(parents, inside, tokens, scores)
        depths, path_scores = self._inherited(parents, inside, inner, scores)
        rows = np.flatnonzero(depths <= MAX_TREE_DEPTH)
        rows = rows[self._make_room(depths[rows], path_scores[rows])]
        slots = np.full(len(tokens), DROPPED)
        slots[rows] = self._upcoming(len(rows))
        above = np.where(inner[rows], slots[inside[rows]], parents[rows])
        ids = tokens[rows]
        self._place(above, ids, depths[rows], path_scores[rows], self._key(above, ids))
        return slots

    def mark_expanded(self, slots: npt.ArrayLike) -> None:
        """Notes that the children of these nodes (int ``[k]``, ``ROOT`` too) have been added.

        Raises:
            ValueError: a slot is not in the tree.
        """
        members = np.atleast_1d(np.asarray(slots, np.int64))
        if len(members):
            self._require_members(members)
            self._expanded[members] = True

    @property
    def is_bare(self) -> bool:
        """Whether there is only the root, which has not been expanded."""
        return not len(self) and not self._expanded[ROOT]

    def frontier(self, width: int) -> IntArray:
        """At most ``width`` unexpanded nodes, int64, best first; ``ROOT`` while unexpanded.

        Nodes at ``MAX_TREE_DEPTH`` are left out: they cannot have children.
        """
        growing = (self._depths >= 0) & (self._depths < MAX_TREE_DEPTH) & ~self._expanded
        nodes = growing.nonzero()[0]
        best = nodes[self._best_first(nodes)[: max(width, 0)]]
        best[best == self.capacity] = ROOT
        return best

    def select(self, budget: int, min_score: float = 0.0) -> tuple[DraftTree, IntArray]:
        """The ``budget`` best nodes with path scores of at least ``min_score``, and their slots.

        They are in topological order, best score first; node i of the tree is ``slots[i]``.
        """
        live = self.slots
        chosen = live[self._best_first(live)[: max(budget, 0)]]
        scores = self._scores[chosen]
        if len(chosen) and scores[-1] < min_score:
            count = int(np.searchsorted(-scores, -min_score, side="right"))
            chosen, scores = chosen[:count], scores[:count]
        rank = np.full(self.capacity + 1, ROOT, np.int64)
        rank[chosen] = np.arange(len(chosen))
        tree = DraftTree(
            tokens=self._tokens[chosen],
            parent_indices=rank[self._parents[chosen]],
            scores=scores,
            law=self.law,
        )
        return tree, chosen

    def reroot(self, committed: npt.ArrayLike) -> Reroot:
        """Moves the root down the newly committed tokens (int ``[k]``).

        If all of them are found, the subtree below survives, its scores divided by the new
        root's, and the root is expanded if that node was. Otherwise all nodes go and the
        root is unexpanded.
        """
        tokens = np.asarray(committed, np.int64)
        if self.is_bare:
            return Reroot(path_slots=_NONE, kept_slots=_NONE, num_committed=len(tokens))
        ids = tokens.tolist()
        path = self._walk(ids)
        path_slots = np.array(path, np.int64)
        if len(path) < len(ids):
            self.clear()
            kept = np.zeros(0, np.int64)
        else:
            kept = self._keep_below(path[-1]) if path else self.slots
        return Reroot(path_slots=path_slots, kept_slots=kept, num_committed=len(ids))

    def clear(self) -> None:
        """Removes every node; the root is unexpanded again."""
        self._release(self.slots)
        self._expanded[ROOT] = False

    def _best_first(self, nodes: IntArray) -> IntArray:
        return np.lexsort((self._births[nodes], self._depths[nodes], -self._scores[nodes]))

    def _add_with_aliases(
        self, parents: IntArray, tokens: IntArray, scores: FloatArray, keys: IntArray, aliases: BoolArray
    ) -> IntArray:
        old: BoolArray = np.logical_or.reduce(aliases, axis=1)
        distinct, firsts, of_distinct = np.unique(keys, return_index=True, return_inverse=True)
        slots = np.full(len(distinct), DROPPED)
        known = old[firsts]
        slots[known] = aliases[firsts[known]].argmax(axis=1)
        # In the order given, so that ages do not depend on token ids.
        fresh = np.flatnonzero(~known)
        fresh = fresh[np.argsort(firsts[fresh])]
        rows = firsts[fresh]
        births_before = self._next_birth
        slots[fresh] = self._add_distinct(parents[rows], tokens[rows], scores[rows], keys[rows])
        # An aliased node may have been pushed out by this very call, and its slot reused.
        gone = known & ((self._depths[slots] < 0) | (self._births[slots] >= births_before))
        slots[gone] = DROPPED
        return slots[of_distinct]

    def _add_distinct(
        self, parents: IntArray, tokens: IntArray, scores: FloatArray, keys: IntArray
    ) -> IntArray:
        depths = self._depths[parents] + 1
        path_scores = np.maximum(self._scores[parents] * scores, SMALLEST_SCORE)
        fits = depths <= MAX_TREE_DEPTH
        if fits.all() and len(tokens) <= self._num_free:
            return self._place(parents, tokens, depths, path_scores, keys)
        slots = np.full(len(tokens), DROPPED)
        rows = np.flatnonzero(fits)
        rows = rows[self._make_room(depths[rows], path_scores[rows])]
        slots[rows] = self._place(parents[rows], tokens[rows], depths[rows], path_scores[rows], keys[rows])
        return slots

    def _has_aliases(self, parents: IntArray, inside: IntArray, inner: BoolArray, tokens: IntArray) -> bool:
        outer = ~inner
        if (self._keys == self._key(parents[outer], tokens[outer])[:, None]).any():
            return True
        family = np.where(inner, self.capacity + inside, parents)
        keys = np.sort(tokens * (self.capacity + len(tokens) + 1) + family)
        return bool((keys[1:] == keys[:-1]).any())

    def _inherited(
        self, parents: IntArray, inside: IntArray, inner: BoolArray, scores: FloatArray
    ) -> tuple[IntArray, FloatArray]:
        """Depths and path scores of a forest, by pointer jumping."""
        depths = np.where(inner, 1, self._depths[parents] + 1)
        path_scores = np.where(inner, scores, self._scores[parents] * scores)
        jump = inside
        while (far := np.flatnonzero(jump >= 0)).size:
            via = jump[far]
            # Right-hand sides are copies, so that a round sees the round before it.
            depths[far] += depths[via]
            path_scores[far] *= path_scores[via]
            jump = jump.copy()
            jump[far] = jump[via]
        np.maximum(path_scores, SMALLEST_SCORE, out=path_scores)
        # Rounding may have put a child above its parent by one unit in the last place.
        while (over := np.flatnonzero(inner & (path_scores > path_scores[inside]))).size:
            path_scores[over] = path_scores[inside[over]]
        return depths, path_scores

    def _graft_by_levels(
        self, parents: IntArray, inside: IntArray, tokens: IntArray, scores: FloatArray
    ) -> IntArray:
        slots = np.full(len(tokens), DROPPED)
        waiting = np.arange(len(tokens))
        level = waiting[inside < 0]
        above = parents
        while len(level):
            births_before = self._next_birth
            slots[level] = self.add(above[level], tokens[level], scores[level])
            waiting = np.setdiff1d(waiting, level, assume_unique=True)
            # What an earlier level placed may have been pushed out, or its slot reused, since.
            placed = np.flatnonzero(slots >= 0)
            gone = placed[self._depths[slots[placed]] < 0]
            reused = np.setdiff1d(placed, level)
            reused = reused[self._births[slots[reused]] >= births_before]
            slots[gone] = slots[reused] = DROPPED
            above = np.where(inside >= 0, slots[inside], parents)
            ready = np.isin(inside[waiting], level)
            level = waiting[ready & (above[waiting] >= 0)]
        return slots

    def _make_room(self, depths: IntArray, path_scores: FloatArray) -> IntArray:
        """Evicts what has to go; returns which of the new nodes may come in, ascending."""
        new = len(depths)
        excess = new - self._num_free
        if excess <= 0:
            return np.arange(new)
        live = self.slots
        scores = np.concatenate([self._scores[live], path_scores])
        below = np.concatenate([self._depths[live], depths])
        ages = np.concatenate([self._births[live], self._next_birth + np.arange(new)])
        low = (scores <= np.partition(scores, excess - 1)[excess - 1]).nonzero()[0]
        order = np.lexsort((ages[low], below[low], -scores[low]))
        # The last ones of an order with parents first: no node stays without its parent.
        worst = low[order[len(order) - excess :]]
        self._release(live[worst[worst < len(live)]])
        welcome = np.ones(new, np.bool_)
        welcome[worst[worst >= len(live)] - len(live)] = False
        return np.flatnonzero(welcome)

    def _walk(self, tokens: list[int]) -> list[int]:
        path: list[int] = []
        node, stride = ROOT, self.capacity + 1
        for token in tokens:
            key = token * stride + node
            node = int((self._keys == key).argmax())
            if self._keys[node] != key:
                break
            path.append(node)
        return path

    def _keep_below(self, new_root: int) -> IntArray:
        """Makes ``new_root`` the root; returns the slots that survive."""
        # Pointer jumping with the new root as a fixed point: who reaches it lies below it.
        jump = self._parents.copy()
        jump[new_root] = new_root
        for _ in range(int(self._depths.max()).bit_length()):
            jump = jump[jump]
        alive = self._depths > 0
        below: BoolArray = np.logical_and(alive, jump == new_root)
        below[new_root] = False
        kept: IntArray = below.nonzero()[0]
        self._scores[kept] /= self._scores[new_root]
        self._depths[kept] -= self._depths[new_root]
        children = kept[self._parents[kept] == new_root]
        self._parents[children] = ROOT
        self._keys[children] = self._tokens[children] * (self.capacity + 1) + ROOT
        self._expanded[ROOT] = self._expanded[new_root]
        self._release((alive & ~below).nonzero()[0])
        return kept
