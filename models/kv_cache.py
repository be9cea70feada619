"""The KV pool, and what each sequence holds of it.

Slots are numbered over the whole pool; a block is 32 consecutive slots (``block_pool``). Block 0
belongs to nobody: its slot 0 stays zero and stands for "no key", its slot 1 takes the writes of
rows that only fill up a row class. A sequence's positions lie in blocks anywhere in the pool, some
of them shared with sequences whose texts begin alike.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.kv_move import kv_move
from outrider.models.block_pool import BLOCK, BlockPool, blocks_for, next_key
from outrider.speculation.errors import OutOfBlocksError

NULL_SLOT = 0
TRASH_SLOT = 1

IntArray = npt.NDArray[np.int64]


class KVCache:
    """Pool ``[layers, slots, 2, kv_heads, head_dim]`` (keys, then values) and its blocks.

    numerics: how entries are computed; part of what published blocks are known by.
    prefix_caching: whether sequences publish what others may begin with.
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        num_blocks: int,
        dtype: torch.dtype,
        numerics: str = "",
        prefix_caching: bool = True,
    ) -> None:
        self.pool = torch.zeros(layers, (num_blocks + 1) * BLOCK, 2, kv_heads, head_dim, dtype=dtype)
        self.layers = list(self.pool)
        self.blocks = BlockPool(num_blocks)
        self.first_key, self.prefix_caching = numerics.encode(), prefix_caching
        self.move: Callable[[torch.Tensor, torch.Tensor], None] = partial(kv_move, self.pool)
        """Copies entries from slots to slots; where others hold parts of them, these have to do it too."""

    def check(self, tables: list[list[int]]) -> None:
        """Asserts that nothing leaked beyond these sequences' tables and the null slot is still zero."""
        self.blocks.check(tables)
        assert not self.pool[:, NULL_SLOT].any(), "the null slot was written to"

    def check_idle(self) -> None:
        """Asserts that no sequence holds anything."""
        self.check([])


class KVSequence:
    """One request's part of the pool.

    length: positions ``[0, length)`` hold the KV of committed tokens; what lies in the reserved
    slots behind them is speculative.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._blocks: list[int] = []
        self.table: IntArray = np.zeros(0, np.int64)
        """Its blocks."""
        self.length = 0
        self._keys = [cache.first_key]

    @property
    def blocks(self) -> list[int]:
        """Its blocks, in the order of positions."""
        return self._blocks

    @property
    def room(self) -> int:
        """Positions that it has slots for."""
        return len(self._blocks) * BLOCK

    def reserve(self, positions: int) -> bool:
        """Makes room for so many positions; takes nothing where that is not possible."""
        missing = blocks_for(positions) - len(self._blocks)
        if missing > 0:
            new = self._cache.blocks.allocate(missing)
            if new is None:
                return False
            self._hold(self._blocks + new)
        return True

    def slots(self, start: int, stop: int) -> IntArray:
        """Slots of the positions ``[start, stop)``."""
        positions = np.arange(start, stop)
        slots: IntArray = self.table[positions // BLOCK] * BLOCK + positions % BLOCK
        return slots

    def keep(self, sources: IntArray) -> None:
        """Makes the entries in these slots, in path order, those of the positions after ``length``."""
        count = len(sources)
        targets = self.slots(self.length, self.length + count)
        if not np.array_equal(sources, targets):
            self._cache.move(torch.from_numpy(sources), torch.from_numpy(targets))
        self.length += count

    def shrink(self) -> None:
        """Gives back the blocks in which nothing committed lies."""
        used = blocks_for(self.length)
        if used < len(self._blocks):
            self._cache.blocks.release(self._blocks[used:])
            self._hold(self._blocks[:used])

    def publish(self, tokens: IntArray) -> None:
        """Lets others find the full blocks. tokens: int64, the committed text or its beginning."""
        if not self._cache.prefix_caching:
            return
        for index in range(len(self._keys) - 1, min(self.length, len(tokens)) // BLOCK):
            key = next_key(self._keys[-1], tokens[index * BLOCK : (index + 1) * BLOCK])
            self._keys.append(key)
            self._cache.blocks.publish(self._blocks[index], key)

    def adopt(self, tokens: IntArray) -> None:
        """Begins, still empty, with what published blocks hold of ``tokens`` (int64 ``[n]``)."""
        whole = len(tokens) // BLOCK
        keys = [self._cache.first_key]
        for index in range(whole):
            keys.append(next_key(keys[-1], tokens[index * BLOCK : (index + 1) * BLOCK]))
        found = self._cache.blocks.find(keys[1:])
        self._cache.blocks.share(found)
        self._hold(found)
        self._keys = keys[: len(found) + 1]
        self.length = len(found) * BLOCK

    def fork(self, length: int) -> "KVSequence | None":
        """A sequence that begins with the first ``length`` positions; None without a block for it.

        Full blocks are shared, the rest of the last one is copied.
        """
        whole, rest = divmod(length, BLOCK)
        child = KVSequence(self._cache)
        self._cache.blocks.share(self._blocks[:whole])
        child._hold(self._blocks[:whole])
        if rest and not child.reserve(length):
            child.close()
            return None
        if rest:
            start = whole * BLOCK
            mine, copy = self.slots(start, length), child.slots(start, length)
            self._cache.move(torch.from_numpy(mine), torch.from_numpy(copy))
        child._keys = self._keys[: whole + 1]
        child.length = length
        return child

    def close(self) -> None:
        """Gives the blocks back."""
        self._cache.blocks.release(self._blocks)
        self._hold([])
        self.length = 0

    def _hold(self, blocks: list[int]) -> None:
        self._blocks = blocks
        self.table = np.array(blocks, np.int64)


class NodeArena:
    """Slots for the nodes of a tree that outlives steps: node i keeps its entry at ``slots[i]``.

    Raises:
        OutOfBlocksError: there are not enough free blocks.
    """

    def __init__(self, cache: KVCache, capacity: int) -> None:
        blocks = cache.blocks.allocate(blocks_for(capacity))
        if blocks is None:
            raise OutOfBlocksError(
                f"{capacity} nodes do not fit: {cache.blocks.num_free} blocks of {BLOCK} are free"
            )
        self._pool, self.blocks = cache.blocks, blocks
        self.slots: IntArray = (np.array(blocks)[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)[:capacity]

    def close(self) -> None:
        """Gives the blocks back."""
        self._pool.release(self.blocks)
        self.blocks = []
