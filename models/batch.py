"""From rows and their paths to what a forward needs: slots, positions and attention groups.

Plain numpy, once per step and never per layer. A row is a token at a position; it sees the
committed positions up to its own and the nodes on its path.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.tree_attention import STRIDE, TAIL, AttentionGroup
from outrider.models.kv_cache import NULL_SLOT, KVSequence
from outrider.models.numerics import RowClasses

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """R rows of one sequence, M of whose draft nodes matter.

    tokens, positions, slots: int64 ``[R]``; slots is where each row's KV goes.
    committed: positions ``[0, committed)`` are in place, or are written by these very rows.
    paths: bool ``[R, M]``, the nodes each row attends, itself included.
    node_positions, node_slots: int64 ``[M]``.
    """

    tokens: IntArray
    positions: IntArray
    slots: IntArray
    committed: int
    paths: BoolArray
    node_positions: IntArray
    node_slots: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Tensors of one forward of R rows.

    tokens, positions, slots: int64 ``[R]``.
    first_logit_row: the first row whose logits are wanted; R means none.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    groups: list[AttentionGroup]
    first_logit_row: int


def prefill_rows(sequence: KVSequence, tokens: IntArray) -> Rows:
    """The next ``tokens`` of the committed text, behind what is already cached."""
    start, count = sequence.length, len(tokens)
    positions = np.arange(start, start + count)
    return Rows(
        tokens=tokens,
        positions=positions,
        slots=sequence.base + positions,
        committed=start + count,
        paths=np.zeros((count, 0), np.bool_),
        node_positions=np.zeros(0, np.int64),
        node_slots=np.zeros(0, np.int64),
    )


def tree_rows(
    sequence: KVSequence, root: int, tokens: IntArray, depths: IntArray, ancestors: BoolArray
) -> Rows:
    """The last committed token as row 0, then the nodes of a tree whose KV goes to slots 0, 1, …"""
    position = sequence.length
    nodes = len(tokens)
    node_slots = sequence.node_base + np.arange(nodes)
    paths = np.zeros((nodes + 1, nodes), np.bool_)
    paths[1:] = ancestors
    return Rows(
        tokens=np.concatenate(([root], tokens)),
        positions=np.concatenate(([position], position + depths)),
        slots=np.concatenate(([sequence.base + position], node_slots)),
        committed=position + 1,
        paths=paths,
        node_positions=position + depths,
        node_slots=node_slots,
    )


def make_batch(rows: Rows, base: int, classes: RowClasses, dtype: torch.dtype, first_logit_row: int) -> Batch:
    """Lays out one forward; ``base`` is the slot of position 0 and ``dtype`` that of scores."""
    groups = (
        _canonical_groups(rows, base, classes, dtype)
        if classes.canonical
        else [_fast_group(rows, base, dtype)]
    )
    return Batch(
        tokens=torch.from_numpy(rows.tokens),
        positions=torch.from_numpy(rows.positions),
        slots=torch.from_numpy(rows.slots),
        groups=groups,
        first_logit_row=first_logit_row,
    )


def _canonical_groups(rows: Rows, base: int, classes: RowClasses, dtype: torch.dtype) -> list[AttentionGroup]:
    """Rows with equal shared prefixes together; see ``kernels/tree_attention``."""
    prefix = STRIDE * np.maximum(0, rows.positions // STRIDE - 1)
    slots, mask = _canonical_tails(rows, base, prefix)
    groups = []
    for shared in np.unique(prefix):
        members = np.flatnonzero(prefix == shared)
        everyone = len(members) == len(prefix)
        groups.append(
            AttentionGroup(
                rows=None if everyone else torch.from_numpy(members),
                num_rows=len(members),
                padded=classes.attention_rows(len(members)),
                shared=(base, int(shared)),
                tail_slots=torch.from_numpy(slots[members].reshape(-1)),
                tail_mask=torch.from_numpy(mask[members, None]).to(dtype),
            )
        )
    return groups


def _canonical_tails(rows: Rows, base: int, prefix: IntArray) -> tuple[IntArray, npt.NDArray[np.float32]]:
    """Tail slots int64 ``[R, TAIL]`` and masks ``[R, TAIL]``, in path order."""
    positions = prefix[:, None] + np.arange(TAIL)
    seen = np.minimum(rows.positions, rows.committed - 1)[:, None]
    slots = np.where(positions <= seen, base + positions, NULL_SLOT)
    row, node = np.nonzero(rows.paths)
    slots[row, rows.node_positions[node] - prefix[row]] = rows.node_slots[node]
    mask = np.where(positions <= rows.positions[:, None], np.float32(0), np.float32(-np.inf))
    return slots, mask


def _fast_group(rows: Rows, base: int, dtype: torch.dtype) -> AttentionGroup:
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
        shared=(base, shared),
        tail_slots=torch.from_numpy(np.concatenate((base + later, rows.node_slots))),
        tail_mask=torch.from_numpy(mask[:, None]).to(dtype),
    )
