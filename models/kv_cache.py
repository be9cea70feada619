"""The KV pool and who owns which of its blocks.

Slots are numbered over the whole pool; a block is 32 consecutive slots. Block 0 belongs to
nobody: its slot 0 stays zero and stands for "no key", its slot 1 takes the writes of rows
that only fill up a row class. A sequence owns a run of blocks for its positions and, behind
it, an arena for the nodes of its draft tree, so that committed and speculative entries never
share a slot and accepting nodes is a plain copy.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.kv_move import kv_move
from outrider.speculation.errors import OutOfBlocksError

BLOCK = 32
NULL_SLOT = 0
TRASH_SLOT = 1


def blocks_for(slots: int) -> int:
    """Blocks that hold this many slots."""
    return -(-slots // BLOCK)


class KVCache:
    """Pool ``[layers, slots, 2, kv_heads, head_dim]`` (keys, then values) and its free blocks."""

    def __init__(
        self, *, layers: int, kv_heads: int, head_dim: int, num_blocks: int, dtype: torch.dtype
    ) -> None:
        self.pool = torch.zeros(layers, (num_blocks + 1) * BLOCK, 2, kv_heads, head_dim, dtype=dtype)
        self.layers = list(self.pool)
        self.move: Callable[[torch.Tensor, torch.Tensor], None] = partial(kv_move, self.pool)
        """Copies entries from slots to slots; where others hold parts of them, these have to do it too."""
        self._free = np.ones(num_blocks + 1, np.bool_)
        self._free[0] = False

    @property
    def num_free_blocks(self) -> int:
        return int(self._free.sum())

    def allocate(self, count: int) -> range | None:
        """A run of ``count`` consecutive free blocks, or None when there is none."""
        if count == 0:
            return range(0)
        runs = np.convolve(self._free, np.ones(count, np.int64), mode="valid")
        fits = np.flatnonzero(runs == count)
        if not len(fits):
            return None
        blocks = range(int(fits[0]), int(fits[0]) + count)
        self._free[blocks.start : blocks.stop] = False
        return blocks

    def free(self, blocks: range) -> None:
        assert not self._free[blocks.start : blocks.stop].any(), f"blocks {blocks} were free already"
        self._free[blocks.start : blocks.stop] = True

    def check_idle(self) -> None:
        """Asserts that nothing leaked: every block is free and the null slot is still zero."""
        assert self._free[1:].all(), f"{int((~self._free[1:]).sum())} KV blocks leaked"
        assert not self.pool[:, NULL_SLOT].any(), "the null slot was written to"


class KVSequence:
    """One request's part of the pool.

    table: int64, the blocks of its positions.
    length: positions ``[0, length)`` hold the KV of committed tokens.
    Node i of the draft tree keeps its entry at ``node_base + i`` until it is committed or dropped.
    """

    def __init__(self, cache: KVCache, *, max_tokens: int, max_nodes: int) -> None:
        position_blocks = blocks_for(max_tokens)
        blocks = cache.allocate(position_blocks + blocks_for(max_nodes))
        if blocks is None:
            raise OutOfBlocksError(
                f"{max_tokens} tokens and {max_nodes} nodes do not fit the KV cache: "
                f"{cache.num_free_blocks} blocks of {BLOCK} are free"
            )
        self._cache, self._blocks = cache, blocks
        self.base = blocks.start * BLOCK
        self.table = np.arange(blocks.start, blocks.start + position_blocks)
        self.node_base = self.base + position_blocks * BLOCK
        self.max_tokens, self.max_nodes = max_tokens, max_nodes
        self.length = 0

    def commit_nodes(self, nodes: npt.NDArray[np.int64]) -> None:
        """Moves accepted nodes' entries, in path order, to the positions after ``length``."""
        if len(nodes):
            target = np.arange(self.length, self.length + len(nodes)) + self.base
            self._cache.move(torch.from_numpy(nodes + self.node_base), torch.from_numpy(target))
            self.length += len(nodes)

    def close(self) -> None:
        """Gives the blocks back."""
        self._cache.free(self._blocks)
        self._blocks = range(0)
