"""From rows and their paths to what a forward needs: slots, positions and attention groups.

Once per step and never per layer. A row is a token at a position; it sees the
committed positions up to its own and the nodes on its path.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.native import library
from outrider.kernels.paged_attention import PagedPaths, TreeKeys
from outrider.kernels.path_attention import PathKeys
from outrider.kernels.tree_attention import STRIDE, TAIL, AttentionGroup
from outrider.models.block_pool import BLOCK, blocks_for
from outrider.models.kv_cache import NULL_SLOT, KVSequence
from outrider.models.numerics import RowClasses
from outrider.speculation.tree import ROOT

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Attended: TypeAlias = list[AttentionGroup] | PathKeys | TreeKeys | PagedPaths
"""What rows attend, in the form that a decoder's attention takes; the last one stands on a device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """R rows of one sequence, M of whose draft nodes matter.

    tokens, positions, slots: int64 ``[R]``; slots is where each row's KV goes.
    committed: positions ``[0, committed)`` are in place, or are written by these very rows.
    nodes: int64 ``[R]``, the row's own node, which it attends as it does those above; ``ROOT``: it is text.
    node_parents, node_depths, node_slots: int64 ``[M]``. A child of the last committed token has the
    parent ``ROOT`` and the depth 1. Of nodes that no row attends nothing has to be right.
    table: int64, the blocks of the positions.
    first_logit_row: the first row whose logits are wanted; R means none.
    """

    tokens: IntArray
    positions: IntArray
    slots: IntArray
    committed: int
    nodes: IntArray
    node_parents: IntArray
    node_depths: IntArray
    node_slots: IntArray
    table: IntArray
    first_logit_row: int

    def committed_slots(self, positions: IntArray) -> IntArray:
        """Slots of positions of the committed text, in the same shape."""
        slots: IntArray = self.table[positions // BLOCK] * BLOCK + positions % BLOCK
        return slots

    def attended_nodes(self) -> "AttendedNodes":
        """All that some row attends, in the order of their numbers."""
        levels = []
        level = self.nodes
        while (inner := level >= 0).any():
            levels.append(level)
            level = np.where(inner, self.node_parents[level], ROOT)
        ancestors = np.stack(levels, axis=1) if levels else np.zeros((len(self.nodes), 0), np.int64)
        rows, columns = (ancestors >= 0).nonzero()
        nodes, index = np.unique(ancestors[rows, columns], return_inverse=True)
        paths = np.zeros((len(ancestors), len(nodes)), np.bool_)
        paths[rows, index] = True
        return AttendedNodes(
            paths=paths,
            positions=self.committed - 1 + self.node_depths[nodes],
            slots=self.node_slots[nodes],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendedNodes:
    """m nodes.

    paths: bool ``[R, m]``, those that each row attends, itself included.
    positions, slots: int64 ``[m]``.
    """

    paths: BoolArray
    positions: IntArray
    slots: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Tensors of one forward of R rows, those of each sequence behind one another.

    tokens, positions, slots: int64 ``[R]``; int32 on a device.
    logit_rows: the rows whose logits are wanted, ascending; a slice where they are consecutive.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    attended: Attended
    logit_rows: slice | torch.Tensor


def text_rows(sequence: KVSequence, tokens: IntArray, *, first_logit_row: int) -> Rows:
    """The next ``tokens`` of the committed text."""
    start, count = sequence.length, len(tokens)
    return Rows(
        tokens=tokens,
        positions=np.arange(start, start + count),
        slots=sequence.slots(start, start + count),
        committed=start + count,
        nodes=np.full(count, ROOT),
        node_parents=_NONE,
        node_depths=_NONE,
        node_slots=_NONE,
        table=sequence.table,
        first_logit_row=first_logit_row,
    )


def tree_rows(
    sequence: KVSequence,
    text: IntArray,
    tokens: IntArray,
    parents: IntArray,
    depths: IntArray,
    *,
    text_logits: int = 0,
) -> Rows:
    """The committed tokens ``text`` that are not cached yet, the last being the tree's root, then its nodes.

    The nodes' KV goes where the following positions' would. Logits are the root's and the nodes', and
    before them those of the last ``text_logits`` tokens above the root.
    """
    if not len(tokens):
        return text_rows(sequence, text, first_logit_row=len(text) - 1 - text_logits)
    start, known, nodes = sequence.length, len(text), len(tokens)
    root = start + known - 1
    slots = sequence.slots(start, root + 1 + nodes)
    own = np.arange(-known, nodes)
    own[:known] = ROOT
    return Rows(
        tokens=np.concatenate((text, tokens)),
        positions=np.concatenate((np.arange(start, root + 1), root + depths)),
        slots=slots,
        committed=root + 1,
        nodes=own,
        node_parents=parents,
        node_depths=depths,
        node_slots=slots[known:],
        table=sequence.table,
        first_logit_row=known - 1 - text_logits,
    )


def make_batch(
    parts: Sequence[Rows], classes: RowClasses, dtype: torch.dtype, window: int | None = None
) -> Batch:
    """Lays out one forward over rows of different sequences; ``dtype`` is that of scores.

    window: of the positions up to its own a row attends the last so many; None: all.
    """
    *offsets, _ = accumulate((len(part.tokens) for part in parts), initial=0)
    attended: Attended
    if classes.by_path:
        tokens, positions, slots, attended = _by_path(parts, window)
    else:
        tokens, positions, slots = _joined(parts)
        attended = _tree_keys(parts, window) if classes.by_tree else _groups(parts, offsets, classes, dtype)
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        attended=attended,
        logit_rows=_logit_rows(parts, offsets),
    )


def _joined(parts: Sequence[Rows]) -> tuple[IntArray, IntArray, IntArray]:
    """Tokens, positions and slots."""
    return (
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.positions for part in parts]),
        np.concatenate([part.slots for part in parts]),
    )


def _by_path(parts: Sequence[Rows], window: int | None) -> tuple[IntArray, IntArray, IntArray, PathKeys]:
    """Tokens, positions and slots; and positions through the parts' tables, then the nodes of paths."""
    batcher = library.batcher(Rows, BLOCK)
    if batcher is None:
        return *_joined(parts), _path_keys(parts, window)
    laid_out = batcher(parts, -1 if window is None else window)
    tokens, positions, slots, tables, table_starts, first, seen, nodes, node_starts = laid_out
    keys = PathKeys(
        tables=tables,
        table_starts=table_starts,
        first=first,
        seen=seen,
        nodes=nodes,
        node_starts=node_starts,
    )
    return tokens, positions, slots, keys


def _path_keys(parts: Sequence[Rows], window: int | None) -> PathKeys:
    """What the native module computes, plainly."""
    counts = [len(part.tokens) for part in parts]
    seen, before = _seen(parts, counts, window)
    nodes, lengths = _path_nodes(parts, counts, before)
    tables = _tables(parts)
    return PathKeys(
        tables=np.concatenate(tables),
        table_starts=np.repeat(_ends(tables)[:-1], counts),
        first=np.minimum(before, seen),
        seen=seen,
        nodes=nodes,
        node_starts=np.concatenate((_ZERO, np.cumsum(lengths))),
    )


def _seen(parts: Sequence[Rows], counts: Sequence[int], window: int | None) -> tuple[IntArray, IntArray]:
    """int64 ``[R]`` each: where the text ends that a row sees, and positions its window has left behind."""
    positions = np.concatenate([part.positions for part in parts])
    last = np.repeat([part.committed - 1 for part in parts], counts)
    before = np.zeros_like(positions) if window is None else np.maximum(0, positions - window + 1)
    return np.minimum(positions, last) + 1, before


def _tables(parts: Sequence[Rows]) -> list[IntArray]:
    """The blocks of the parts' texts."""
    return [part.table[: blocks_for(part.committed)] for part in parts]


def _tree_keys(parts: Sequence[Rows], window: int | None) -> TreeKeys:
    """The parts' texts and nodes, and who sees which of them."""
    counts = [len(part.tokens) for part in parts]
    seen, before = _seen(parts, counts, window)
    tables, attended = _tables(parts), [part.attended_nodes() for part in parts]
    nodes = [each.slots for each in attended]
    words = max(1, -(-max(map(len, nodes)) // 32))
    ancestors = np.zeros((len(seen), 4 * words), np.uint8)
    for each, start, count in zip(attended, accumulate(counts, initial=0), counts, strict=False):
        rows = slice(start, start + count)
        visible = each.paths & (each.positions >= before[rows, None])
        bits = np.packbits(visible, axis=1, bitorder="little")
        ancestors[rows, : bits.shape[1]] = bits
    return TreeKeys(
        row_starts=torch.from_numpy(np.cumsum([0, *counts])),
        tables=torch.from_numpy(np.concatenate(tables)),
        table_starts=torch.from_numpy(_ends(tables)[:-1]),
        first=torch.from_numpy(np.minimum(before, seen)),
        seen=torch.from_numpy(seen),
        node_slots=torch.from_numpy(np.concatenate(nodes)),
        node_starts=torch.from_numpy(_ends(nodes)),
        ancestors=torch.from_numpy(ancestors.view(np.int32)),
        longest=int(seen.max()),
    )


_ZERO: IntArray = np.zeros(1, np.int64)
_NONE: IntArray = np.zeros(0, np.int64)


def _path_nodes(parts: Sequence[Rows], counts: Sequence[int], before: IntArray) -> tuple[IntArray, IntArray]:
    """Slots of the nodes that rows attend, one row's behind the other's, and how many each attends.

    before: int64 ``[R]``, positions that a row's window has left behind.
    """
    nodes = [_NONE]
    lengths = np.zeros(len(before), np.int64)
    for part, start, count in zip(parts, accumulate(counts, initial=0), counts, strict=False):
        attended, rows = part.attended_nodes(), slice(start, start + count)
        paths = attended.paths & (attended.positions >= before[rows, None])
        row, node = np.nonzero(paths)
        order = np.lexsort((attended.positions[node], row))
        nodes.append(attended.slots[node[order]])
        lengths[rows] = np.count_nonzero(paths, axis=1)
    return np.concatenate(nodes), lengths


def _ends(arrays: Sequence[IntArray]) -> IntArray:
    """0 and where each array ends when all stand behind one another."""
    return np.cumsum([0, *map(len, arrays)])


def _groups(
    parts: Sequence[Rows], offsets: Sequence[int], classes: RowClasses, dtype: torch.dtype
) -> list[AttentionGroup]:
    groups = []
    for part, offset in zip(parts, offsets, strict=True):
        own = _canonical_groups(part, classes, dtype) if classes.canonical else [_fast_group(part, dtype)]
        groups += own if len(parts) == 1 else [_shifted(group, offset) for group in own]
    return groups


def _shifted(group: AttentionGroup, offset: int) -> AttentionGroup:
    """The group of a part whose rows start at ``offset``."""
    rows = torch.arange(group.num_rows) if group.rows is None else group.rows
    return replace(group, rows=rows + offset)


def _logit_rows(parts: Sequence[Rows], offsets: Sequence[int]) -> slice | torch.Tensor:
    ranges = [
        (offset + part.first_logit_row, offset + len(part.tokens))
        for part, offset in zip(parts, offsets, strict=True)
        if part.first_logit_row < len(part.tokens)
    ]
    if not ranges:
        return slice(0, 0)
    if all(stop == start for (_, stop), (start, _) in pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1])
    return torch.from_numpy(np.concatenate([np.arange(*each) for each in ranges]))


def _canonical_groups(rows: Rows, classes: RowClasses, dtype: torch.dtype) -> list[AttentionGroup]:
    """Rows with equal shared prefixes together; see ``kernels/tree_attention``."""
    prefix = STRIDE * np.maximum(0, rows.positions // STRIDE - 1)
    slots, mask = _canonical_tails(rows, prefix)
    groups = []
    for shared in np.unique(prefix):
        members = np.flatnonzero(prefix == shared)
        everyone = len(members) == len(prefix)
        groups.append(
            AttentionGroup(
                rows=None if everyone else torch.from_numpy(members),
                num_rows=len(members),
                padded=classes.attention_rows(len(members)),
                shared=_prefix(rows, int(shared)),
                tail_slots=torch.from_numpy(slots[members].reshape(-1)),
                tail_mask=torch.from_numpy(mask[members, None]).to(dtype),
            )
        )
    return groups


def _canonical_tails(rows: Rows, prefix: IntArray) -> tuple[IntArray, npt.NDArray[np.float32]]:
    """Tail slots int64 ``[R, TAIL]`` and masks ``[R, TAIL]``, in path order."""
    positions = prefix[:, None] + np.arange(TAIL)
    seen = np.minimum(rows.positions, rows.committed - 1)[:, None]
    committed = rows.committed_slots(np.minimum(positions, rows.committed - 1))
    slots = np.where(positions <= seen, committed, NULL_SLOT)
    nodes = rows.attended_nodes()
    row, node = np.nonzero(nodes.paths)
    slots[row, nodes.positions[node] - prefix[row]] = nodes.slots[node]
    mask = np.where(positions <= rows.positions[:, None], np.float32(0), np.float32(-np.inf))
    return slots, mask


def _fast_group(rows: Rows, dtype: torch.dtype) -> AttentionGroup:
    """All rows over the committed keys that all of them see, the rest in one masked tail."""
    seen = np.minimum(rows.positions, rows.committed - 1)
    shared = int(seen.min()) + 1
    later, nodes = np.arange(shared, rows.committed), rows.attended_nodes()
    visible = np.concatenate((later <= seen[:, None], nodes.paths), axis=1)
    mask = np.where(visible, np.float32(0), np.float32(-np.inf))
    return AttentionGroup(
        rows=None,
        num_rows=len(seen),
        padded=len(seen),
        shared=_prefix(rows, shared),
        tail_slots=torch.from_numpy(np.concatenate((rows.committed_slots(later), nodes.slots))),
        tail_mask=torch.from_numpy(mask[:, None]).to(dtype),
    )


def _prefix(rows: Rows, count: int) -> torch.Tensor:
    """Slots int64 ``[count]`` of the first positions."""
    return torch.from_numpy(rows.committed_slots(np.arange(count)))
