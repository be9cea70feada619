"""From rows and their paths to what a forward needs: slots, positions and attention groups.

Plain numpy, once per step and never per layer. A row is a token at a position; it sees the
committed positions up to its own and the nodes on its path.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.paged_attention import PagedPaths, TreeKeys
from outrider.kernels.path_attention import PathKeys
from outrider.kernels.tree_attention import STRIDE, TAIL, AttentionGroup
from outrider.models.block_pool import BLOCK, blocks_for
from outrider.models.kv_cache import NULL_SLOT, KVSequence
from outrider.models.numerics import RowClasses

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Attended: TypeAlias = list[AttentionGroup] | PathKeys | TreeKeys | PagedPaths
"""What rows attend, in the form that a decoder's attention takes; the last one stands on a device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """R rows of one sequence, M of whose draft nodes matter.

    tokens, positions, slots: int64 ``[R]``; slots is where each row's KV goes.
    committed: positions ``[0, committed)`` are in place, or are written by these very rows.
    paths: bool ``[R, M]``, the nodes each row attends, itself included.
    node_positions, node_slots: int64 ``[M]``.
    table: int64, the blocks of the positions.
    first_logit_row: the first row whose logits are wanted; R means none.
    """

    tokens: IntArray
    positions: IntArray
    slots: IntArray
    committed: int
    paths: BoolArray
    node_positions: IntArray
    node_slots: IntArray
    table: IntArray
    first_logit_row: int

    def committed_slots(self, positions: IntArray) -> IntArray:
        """Slots of positions of the committed text, in the same shape."""
        slots: IntArray = self.table[positions // BLOCK] * BLOCK + positions % BLOCK
        return slots


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
        paths=np.zeros((count, 0), np.bool_),
        node_positions=_NONE,
        node_slots=_NONE,
        table=sequence.table,
        first_logit_row=first_logit_row,
    )


def tree_rows(
    sequence: KVSequence,
    text: IntArray,
    tokens: IntArray,
    depths: IntArray,
    ancestors: BoolArray,
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
    paths = np.zeros((known + nodes, nodes), np.bool_)
    paths[known:] = ancestors
    return Rows(
        tokens=np.concatenate((text, tokens)),
        positions=np.concatenate((np.arange(start, root + 1), root + depths)),
        slots=slots,
        committed=root + 1,
        paths=paths,
        node_positions=root + depths,
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
        attended = _path_keys(parts, window)
    elif classes.by_tree:
        attended = _tree_keys(parts, window)
    else:
        attended = _groups(parts, offsets, classes, dtype)
    return Batch(
        tokens=_joined([part.tokens for part in parts]),
        positions=_joined([part.positions for part in parts]),
        slots=_joined([part.slots for part in parts]),
        attended=attended,
        logit_rows=_logit_rows(parts, offsets),
    )


def _joined(arrays: Sequence[IntArray]) -> torch.Tensor:
    return torch.from_numpy(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))


def _path_keys(parts: Sequence[Rows], window: int | None) -> PathKeys:
    """Positions through the parts' tables, then the paths' nodes in the order of their positions."""
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
    tables, nodes = _tables(parts), [part.node_slots for part in parts]
    words = max(1, -(-max(map(len, nodes)) // 32))
    ancestors = np.zeros((len(seen), 4 * words), np.uint8)
    for part, start, count in zip(parts, accumulate(counts, initial=0), counts, strict=False):
        rows = slice(start, start + count)
        visible = part.paths & (part.node_positions >= before[rows, None])
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
        if not part.paths.shape[1]:
            continue
        rows = slice(start, start + count)
        paths = part.paths & (part.node_positions >= before[rows, None])
        row, node = np.nonzero(paths)
        order = np.lexsort((part.node_positions[node], row))
        nodes.append(part.node_slots[node[order]])
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
    row, node = np.nonzero(rows.paths)
    slots[row, rows.node_positions[node] - prefix[row]] = rows.node_slots[node]
    mask = np.where(positions <= rows.positions[:, None], np.float32(0), np.float32(-np.inf))
    return slots, mask


def _fast_group(rows: Rows, dtype: torch.dtype) -> AttentionGroup:
    """All rows over the committed keys that all of them see, the rest in one masked tail."""
    seen = np.minimum(rows.positions, rows.committed - 1)
    shared = int(seen.min()) + 1
    later = np.arange(shared, rows.committed)
    visible = np.concatenate((later <= seen[:, None], rows.paths), axis=1)
    mask = np.where(visible, np.float32(0), np.float32(-np.inf))
    return AttentionGroup(
        rows=None,
        num_rows=len(seen),
        padded=len(seen),
        shared=_prefix(rows, shared),
        tail_slots=torch.from_numpy(np.concatenate((rows.committed_slots(later), rows.node_slots))),
        tail_mask=torch.from_numpy(mask[:, None]).to(dtype),
    )


def _prefix(rows: Rows, count: int) -> torch.Tensor:
    """Slots int64 ``[count]`` of the first positions."""
    return torch.from_numpy(rows.committed_slots(np.arange(count)))
