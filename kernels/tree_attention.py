"""Attention of plain and tree rows over a slot-addressed KV pool, by PyTorch's products.

Used where the native kernel of ``path_attention`` is not: in float64, and where nothing was built.

R rows, G key/value heads, Q query heads per key/value head, D head size, S shared keys,
W tail keys, N slots. A row attends the first S committed keys and a tail: the end of the committed
text and its own ancestors. Where they lie is given by slot numbers, and each layer gathers them.

*Canonical* attention makes a row's bits depend on its path alone (docs/numerics.md). For a
row at position p, ``S = STRIDE * max(0, p // STRIDE - 1)`` and the tail holds the 64 positions
from S on, in path order, those after p masked; every row reduces over exactly these keys in
exactly this order, however many other rows stand beside it. Products over the shared keys
have R as a dimension, so R is padded to a multiple that a start-up probe found harmless;
products over the tail are made per row.

*Fast* attention shares all committed keys and one tail of all nodes, masked.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

TAIL = 64
"""Positions in a canonical tail."""
STRIDE = TAIL // 2
"""Canonical prefixes end at multiples of this; a tree may be this deep."""

ALIGNMENT = 64
"""Bytes of a cache line, and of the widest vector register."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionGroup:
    """r rows of one sequence that share a prefix.

    rows: int64 ``[r]``, which rows of the batch; None means all of them, in order.
    num_rows: r.
    padded: r, rounded up to the row class of the products over shared keys.
    shared: int64 ``[S]``, slots of the prefix.
    tail_slots: canonical: int64 ``[r * W]``; fast: int64 ``[W]``, the same for all rows.
    tail_mask: ``[r, 1, W]``, added to scores: 0 or -inf.
    """

    rows: torch.Tensor | None
    num_rows: int
    padded: int
    shared: torch.Tensor
    tail_slots: torch.Tensor
    tail_mask: torch.Tensor


class Scratch:
    """Buffers allocated once, so that no step allocates in proportion to the context."""

    def __init__(self, max_rows: int, shape: tuple[int, int, int], max_keys: int, dtype: torch.dtype) -> None:
        """shape: ``(G, Q, D)``."""
        G, Q, D = shape
        self._buffers = torch.zeros(3, max_rows * G * Q * max_keys, dtype=dtype)
        self._prefix = torch.zeros(max_keys, 2, G, D, dtype=dtype)

    def gathered(self, pool: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Keys and values ``[S, 2, G, D]`` in these slots of one layer's pool."""
        return torch.index_select(pool, 0, slots, out=self._prefix[: len(slots)])

    def view(self, index: int, *shape: int) -> torch.Tensor:
        """The start of buffer ``index`` in the given shape; holds whatever was left there."""
        return self._buffers[index, : math.prod(shape)].view(shape)


class TreeAttention:
    """One step's attention: buffers and views are laid out once and used by every layer.

    shape: ``(G, Q, D)``. rows: R; further rows of ``q`` and ``out`` are left alone.
    """

    def __init__(
        self,
        groups: Sequence[AttentionGroup],
        shape: tuple[int, int, int],
        scratch: Scratch,
        *,
        rows: int,
        canonical: bool,
    ) -> None:
        self._rows = rows
        self._order = _order(groups)
        self._attend = _Canonical(groups, shape, scratch) if canonical else _Fast(groups, shape, scratch)

    def __call__(self, q: torch.Tensor, pool: torch.Tensor, out: torch.Tensor) -> None:
        """q: ``[R, G, Q, D]``, already scaled. pool: ``[N, 2, G, D]``, one layer's keys and values.

        out: ``[R, G, Q, D]`` in the model's dtype, filled in place.
        """
        q, out = q[: self._rows], out[: self._rows]
        if self._order is None:
            out.copy_(self._attend(q, pool))
        else:
            result = self._attend(q.index_select(0, self._order), pool)
            out.index_copy_(0, self._order, result.to(out.dtype))


def _order(groups: Sequence[AttentionGroup]) -> torch.Tensor | None:
    """Rows int64 ``[R]``, group after group; None when that is the order they have already."""
    rows = [group.rows for group in groups if group.rows is not None]
    if not rows:
        return None
    order = torch.cat(rows)
    return None if torch.equal(order, torch.arange(len(order))) else order


def _starts(groups: Sequence[AttentionGroup]) -> list[int]:
    """Where each group's rows start when all groups' stand behind one another, and where they end."""
    return list(accumulate((group.num_rows for group in groups), initial=0))


class _Canonical:
    """Canonical attention of groups whose rows stand behind one another.

    Scores of tails are one product per row anyway, so all groups' are made at once. The rest goes
    group by group; the rows that fill up a group's class are those of the groups behind it or
    zeros, and what comes out for them is overwritten or left out.
    """

    def __init__(
        self, groups: Sequence[AttentionGroup], shape: tuple[int, int, int], scratch: Scratch
    ) -> None:
        G, Q, D = shape
        *starts, rows = _starts(groups)
        space = max(start + group.padded for start, group in zip(starts, groups, strict=True))
        dtype = groups[0].tail_mask.dtype
        self.tail_slots = _joined([group.tail_slots for group in groups])
        self.tail_mask = _joined([group.tail_mask for group in groups])
        self.tail = torch.empty(rows * TAIL, 2, G, D, dtype=dtype)
        tail = self.tail.view(rows, TAIL, 2, G, D)
        q_heads = _aligned((G, space, Q, D), dtype)
        scores = torch.zeros(G, space, Q, TAIL, dtype=dtype)
        result = _aligned((G, space, Q, D), dtype)
        self.q_rows, self.score_rows = q_heads[:, :rows], scores[:, :rows]
        self.result_rows = result[:, :rows].transpose(0, 1)
        self.key_heads = [
            (q_heads[head, :rows], tail[:, :, 0, head].transpose(1, 2), scores[head, :rows])
            for head in range(G)
        ]
        self.groups = []
        for start, group in zip(starts, groups, strict=True):
            window = slice(start, start + group.padded)
            values = tail[start : start + group.num_rows, :, 1]
            self.groups.append(
                _CanonicalGroup(
                    group.shared, q_heads[:, window], scores[:, window], values, result[:, window], scratch
                )
            )

    def __call__(self, q: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        """Attention ``[R, G, Q, D]`` of ``q`` ``[R, G, Q, D]``."""
        self.q_rows.copy_(q.transpose(0, 1))
        torch.index_select(pool, 0, self.tail_slots, out=self.tail)
        for queries, keys, scores in self.key_heads:
            torch.bmm(queries, keys, out=scores)
        self.score_rows.add_(self.tail_mask)
        # In order: a group leaves rubbish in the rows behind its own.
        for group in self.groups:
            group(pool)
        return self.result_rows


def _aligned(shape: tuple[int, int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros ``[..., D]`` in which every vector begins at a multiple of ``ALIGNMENT`` bytes.

    Some libraries reduce a vector that begins elsewhere in another order, and where a row begins
    depends on the rows before it.
    """
    *outer, D = shape
    quantum = ALIGNMENT // dtype.itemsize
    return torch.zeros(*outer, -(-D // quantum) * quantum, dtype=dtype)[..., :D]


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class _CanonicalGroup:
    """One group's part of the step's buffers, from its tails' scores to its result.

    shared: int64 ``[S]``. q, result: ``[G, padded, Q, D]``. tail_scores: ``[G, padded, Q, TAIL]``.
    tail_values: ``[r, TAIL, G, D]``.
    """

    def __init__(
        self,
        shared: torch.Tensor,
        q: torch.Tensor,
        tail_scores: torch.Tensor,
        tail_values: torch.Tensor,
        result: torch.Tensor,
        scratch: Scratch,
    ) -> None:
        S = len(shared)
        G, padded, Q, D = q.shape
        rows = len(tail_values)
        self.shared, self.scratch = shared, scratch
        self.q_flat, self.tail_scores = q.view(G, padded * Q, D), tail_scores
        self.result, self.result_flat = result, result.view(G, padded * Q, D)
        self.both = scratch.view(0, G, padded, Q, S + TAIL)
        self.probs = probs = scratch.view(1, G, padded, Q, S + TAIL)
        self.probs_shared = probs.view(G, padded * Q, S + TAIL)[:, :, :S]
        self.shared_scores = scratch.view(2, G, padded * Q, S)
        self.shared_scores_4d = self.shared_scores.view(G, padded, Q, S)
        self.value_heads = [
            (probs[head, :rows, :, S:], tail_values[:, :, head], result[head, :rows]) for head in range(G)
        ]

    def __call__(self, pool: torch.Tensor) -> None:
        if not len(self.shared):
            torch.softmax(self.tail_scores, -1, out=self.probs)
            self.result.zero_()
        else:
            prefix = self.scratch.gathered(pool, self.shared)
            torch.bmm(self.q_flat, prefix[:, 0].permute(1, 2, 0), out=self.shared_scores)
            torch.cat((self.shared_scores_4d, self.tail_scores), -1, out=self.both)
            torch.softmax(self.both, -1, out=self.probs)
            torch.bmm(self.probs_shared, prefix[:, 1].transpose(0, 1), out=self.result_flat)
        for probs, values, result in self.value_heads:
            result.baddbmm_(probs, values)


class _Fast:
    """Fast attention of groups whose rows stand behind one another."""

    def __init__(
        self, groups: Sequence[AttentionGroup], shape: tuple[int, int, int], scratch: Scratch
    ) -> None:
        spans = pairwise(_starts(groups))
        self.parts = [
            (slice(*span), _FastRows(group, shape, scratch))
            for span, group in zip(spans, groups, strict=True)
        ]

    def __call__(self, q: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        """Attention ``[R, G, Q, D]`` of ``q`` ``[R, G, Q, D]``."""
        if len(self.parts) == 1:
            return self.parts[0][1](q, pool)
        return torch.cat([attend(q[rows], pool) for rows, attend in self.parts])


class _FastRows:
    """A group's attention over all its shared keys and one masked tail."""

    def __init__(self, group: AttentionGroup, shape: tuple[int, int, int], scratch: Scratch) -> None:
        G, Q, D = shape
        rows, S = group.num_rows, len(group.shared)
        W = len(group.tail_slots)
        self.flat, self.shape = (G, rows * Q, D), (G, rows, Q, D)
        self.shared, self.scratch = group.shared, scratch
        self.tail_slots, self.tail_mask = group.tail_slots, group.tail_mask
        self.shared_scores = scratch.view(0, G, rows * Q, S)
        self.tail_shape = (G, rows, Q, W)
        self.both = scratch.view(1, G, rows * Q, S + W)
        self.probs = scratch.view(2, G, rows * Q, S + W)
        self.probs_shared, self.probs_tail = self.probs[:, :, :S], self.probs[:, :, S:]

    def __call__(self, q: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        by_head = q.transpose(0, 1).reshape(self.flat)
        prefix = self.scratch.gathered(pool, self.shared)
        torch.bmm(by_head, prefix[:, 0].permute(1, 2, 0), out=self.shared_scores)
        if not len(self.tail_slots):
            torch.softmax(self.shared_scores, -1, out=self.probs)
            return torch.bmm(self.probs, prefix[:, 1].transpose(0, 1)).view(self.shape).transpose(0, 1)
        tail = pool.index_select(0, self.tail_slots)
        tail_scores = torch.bmm(by_head, tail[:, 0].permute(1, 2, 0))
        tail_scores.view(self.tail_shape).add_(self.tail_mask)
        torch.cat((self.shared_scores, tail_scores), -1, out=self.both)
        torch.softmax(self.both, -1, out=self.probs)
        result = torch.bmm(self.probs_shared, prefix[:, 1].transpose(0, 1))
        result.baddbmm_(self.probs_tail, tail[:, 1].transpose(0, 1))
        return result.view(self.shape).transpose(0, 1)
