"""Attention of rows over paths of keys in blocks: the native kernel and a plain reference.

R rows, H query heads, G key/value heads, D head size, N slots, B slots to a block. A row attends
the first positions of its text, found through a table of blocks (where the model's window slides,
the last of them only), then the nodes on its path down the draft tree. Position by position,
whatever stands beside it: a row's bits depend on its path alone, and neither where keys lie nor how
many rows there are changes them (docs/numerics.md).
"""

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.native import library

IntArray = npt.NDArray[np.int64]
MAX_HEAD_DIM = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PathKeys:
    """What R rows attend; all int64.

    tables: blocks of the texts, one table behind the other. table_starts: ``[R]``, where each
    row's begins. first, seen: ``[R]``, a row attends the positions ``[first, seen)`` of its text.
    nodes: slots of the nodes on the rows' paths, from the root downwards, one row's behind the
    other's. node_starts: ``[R + 1]``.
    """

    tables: IntArray
    table_starts: IntArray
    first: IntArray
    seen: IntArray
    nodes: IntArray
    node_starts: IntArray


class PathAttention:
    """One step's attention, for every layer: norms and rotates heads, writes KV, attends.

    turns: complex64 ``[positions, 2, D / 2]``, of queries (scaled by 1/sqrt(D)) and of keys.
    positions, slots: int64 ``[R]``, of the rows, and where their keys and values go. shape: ``(H, G, D)``.
    """

    def __init__(
        self,
        native: ModuleType,
        keys: PathKeys,
        *,
        turns: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        shape: tuple[int, int, int],
        block: int,
    ) -> None:
        self.rows = len(keys.seen)
        # What addresses are taken of must live as long as they are used.
        self._held = turns, positions, slots
        self._native = native
        self.described = (
            *shape,
            block,
            turns.data_ptr(),
            positions.data_ptr(),
            slots.data_ptr(),
            keys.tables,
            keys.table_starts,
            keys.first,
            keys.seen,
            keys.nodes,
            keys.node_starts,
        )
        """What every layer's call begins with."""

    def __call__(
        self,
        heads: torch.Tensor,
        norm: torch.Tensor | None,
        eps: float,
        pool: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """heads: ``[R or more, (H + 2 G) * D]``, contiguous. norm: ``[H + G, D]`` of float32, or None.

        pool: ``[N, 2, G, D]``, one layer's keys and values. out: ``[R or more, H * D]``, filled in
        place. Both have the dtype of the heads.
        """
        self._native.attend(
            *self.described,
            library.KINDS[heads.dtype],
            heads.data_ptr(),
            0 if norm is None else norm.data_ptr(),
            pool.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
            eps,
        )


def path_attention_reference(q: torch.Tensor, pool: torch.Tensor, keys: PathKeys, block: int) -> torch.Tensor:
    """Attention ``[R, G, Q, D]`` in float64 of rotated ``q`` ``[R, G, Q, D]`` over ``pool``."""
    results = []
    for row, start in enumerate(keys.table_starts):
        positions = np.arange(keys.first[row], keys.seen[row])
        slots = keys.tables[start + positions // block] * block + positions % block
        path = keys.nodes[keys.node_starts[row] : keys.node_starts[row + 1]]
        entries = pool[torch.from_numpy(np.concatenate((slots, path)))].double()
        scores = torch.einsum("gqd,kgd->gqk", q[row].double(), entries[:, 0])
        results.append(torch.einsum("gqk,kgd->gqd", scores.softmax(-1), entries[:, 1]))
    return torch.stack(results)
