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
from outrider.models import huge_pages
from outrider.models.block_pool import BLOCK, NO_BLOCK, BlockPool, blocks_for, next_key
from outrider.models.device import CPU
from outrider.models.kernel_set import KVMove
from outrider.speculation.errors import OutOfBlocksError

NULL_SLOT = 0
TRASH_SLOT = 1

IntArray = npt.NDArray[np.int64]


class KVCache:
    """Pool ``[layers, slots, 2, kv_heads, head_dim]`` (keys, then values) and its blocks.

    numerics: how entries are computed; part of what published blocks are known by.
    prefix_caching: whether sequences publish what others may begin with.
    window: of the positions up to its own a row attends the last so many; None: all.
    move: what copies entries on this device; see ``KernelSet``.
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
        window: int | None = None,
        device: torch.device = CPU,
        move: KVMove = kv_move,
    ) -> None:
        shape = layers, (num_blocks + 1) * BLOCK, 2, kv_heads, head_dim
        on_host = device.type == "cpu"
        self.pool = (
            huge_pages.zeros(shape, dtype) if on_host else torch.zeros(shape, dtype=dtype, device=device)
        )
        self.layers = list(self.pool)
        self.blocks = BlockPool(num_blocks)
        self.first_key, self.prefix_caching = numerics.encode(), prefix_caching
        self._window = window
        self.move: Callable[[torch.Tensor, torch.Tensor], None] = partial(move, self.pool)
        """Copies entries from slots to slots; where others hold parts of them, these have to do it too."""

    def blocks_behind(self, length: int) -> int:
        """First blocks of a text of ``length`` cached tokens that no later row attends."""
        # Of the last token, too, which a draft session may take back.
        return 0 if self._window is None else max(0, length - self._window) // BLOCK

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
    slots behind them is speculative. Blocks that the model's window has left behind are given back.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._blocks: list[int] = []
        self._behind = 0
        """How many first ones are ``NO_BLOCK``."""
        self.table: IntArray = np.zeros(0, np.int64)
        """Block of each 32 positions; ``NO_BLOCK`` behind the window."""
        self.length = 0
        self._keys = [cache.first_key]

    @property
    def blocks(self) -> list[int]:
        """The blocks that it holds, in the order of positions."""
        return self._blocks[self._behind :]

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
            self._hold(self._blocks + new, self._behind)
        return True

    def slots(self, start: int, stop: int) -> IntArray:
        """Slots of the positions ``[start, stop)``."""
        block, offset = divmod(start, BLOCK)
        if offset + stop - start <= BLOCK and block < len(self._blocks):
            # One block, as most often: its slots are consecutive.
            first = self._blocks[block] * BLOCK + offset
            return np.arange(first, first + stop - start)
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
            self._hold(self._blocks[:used], self._behind)

    def publish(self, tokens: IntArray) -> None:
        """Lets others find the full blocks, then gives back those that the window has left behind.

        tokens: int64, the committed text or its beginning.
        """
        if self._cache.prefix_caching:
            for index in range(len(self._keys) - 1, min(self.length, len(tokens)) // BLOCK):
                key = next_key(self._keys[-1], tokens[index * BLOCK : (index + 1) * BLOCK])
                self._keys.append(key)
                self._cache.blocks.publish(self._blocks[index], key)
        behind = self._cache.blocks_behind(self.length)
        if behind > self._behind:
            self._cache.blocks.release(self._blocks[self._behind : behind])
            self._hold([NO_BLOCK] * behind + self._blocks[behind:], behind)

    def adopt(self, tokens: IntArray) -> None:
        """Begins, still empty, with what published blocks hold of ``tokens`` (int64 ``[n]``).

        That is as many first tokens as have, of their blocks, all that later rows attend.
        """
        whole = len(tokens) // BLOCK
        keys = [self._cache.first_key]
        for index in range(whole):
            keys.append(next_key(keys[-1], tokens[index * BLOCK : (index + 1) * BLOCK]))
        found = self._cache.blocks.find(keys[1:])
        count, behind = self._usable(found)
        self._cache.blocks.share(found[behind:count])
        self._hold([NO_BLOCK] * behind + found[behind:count], behind)
        self._keys = keys[: count + 1]
        self.length = count * BLOCK

    def can_fork(self, length: int) -> bool:
        """Whether it still holds all that rows behind the first ``length`` positions attend."""
        return self._cache.blocks_behind(length) >= self._behind

    def fork(self, length: int) -> "KVSequence | None":
        """A sequence that begins with the first ``length`` positions; None without a block for it.

        Full blocks are shared, the rest of the last one is copied. See ``can_fork``.
        """
        assert self.can_fork(length), f"the window has left the end of {length} positions behind"
        whole, rest = divmod(length, BLOCK)
        child = KVSequence(self._cache)
        behind = self._cache.blocks_behind(length)
        self._cache.blocks.share(self._blocks[behind:whole])
        child._hold([NO_BLOCK] * behind + self._blocks[behind:whole], behind)
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
        self._cache.blocks.release(self.blocks)
        self._hold([], 0)
        self.length = 0

    def _usable(self, blocks: list[int]) -> tuple[int, int]:
        """How many first blocks of a text to begin with, and how many of these no later row attends."""
        best, together = (0, 0), 0
        for count, block in enumerate(blocks, 1):
            together = 0 if block == NO_BLOCK else together + 1
            behind = self._cache.blocks_behind(count * BLOCK)
            if together >= count - behind:
                best = count, behind
        return best

    def _hold(self, blocks: list[int], behind: int) -> None:
        self._blocks, self._behind = blocks, behind
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
