"""Blocks of a KV pool: which are free, how often each is used, which hold a text that may come again.

Plain Python; the entries themselves lie in ``kv_cache``. A full block of committed tokens is
*published* under a key that stands for its tokens and all before them. A published block that
nobody uses any more keeps what it holds until its place is needed, the longest unused first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

BLOCK = 32
"""Slots of a block."""
NO_BLOCK = 0
"""In place of a block that is not there."""


def blocks_for(slots: int) -> int:
    """Blocks that hold this many slots."""
    return -(-slots // BLOCK)


def next_key(previous: bytes, tokens: npt.NDArray[np.int64]) -> bytes:
    """The key of a block of ``tokens`` (int64 ``[BLOCK]``) behind the text that ``previous`` stands for."""
    return blake2b(previous + tokens.tobytes(), digest_size=16).digest()


class BlockPool:
    """Blocks 1 to ``num_blocks``; what lies in block 0 belongs to nobody."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._empty = list(range(num_blocks, 0, -1))
        self._unused: OrderedDict[int, None] = OrderedDict()
        """Published blocks without users, the longest unused first."""
        self._users = [0] * (num_blocks + 1)
        self._keys: dict[int, bytes] = {}
        self._published: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, some of which may hold texts."""
        return len(self._empty) + len(self._unused)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` blocks for one user, or None when there are not as many."""
        if count > self.num_free:
            return None
        blocks = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        for block in blocks:
            self._users[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more user for each of these."""
        for block in blocks:
            if not self._users[block]:
                assert block in self._unused, f"block {block} holds nothing to share"
                del self._unused[block]
            self._users[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One user less; the end of a text is given up before its beginning."""
        for block in reversed(blocks):
            assert self._users[block] > 0, f"block {block} was free already"
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._keys:
                self._unused[block] = None
            else:
                self._empty.append(block)

    def publish(self, block: int, key: bytes) -> None:
        """Makes a full block known; of two blocks with one text the first is."""
        if key not in self._published:
            self._published[key] = block
            self._keys[block] = key

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks published under these keys, ``NO_BLOCK`` where there is none."""
        return [self._published.get(key, NO_BLOCK) for key in keys]

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Asserts that the blocks in use are those of these tables, as often as they stand there."""
        users = [0] * (self.num_blocks + 1)
        for table in tables:
            for block in table:
                users[block] += 1
        wrong = [block for block in range(self.num_blocks + 1) if users[block] != self._users[block]]
        assert not wrong, f"{len(wrong)} KV blocks leaked or lost, the first is {wrong[0]}"
        free = sorted([*self._empty, *self._unused])
        unused = [block for block in range(1, self.num_blocks + 1) if not users[block]]
        assert free == unused, f"{len(free)} blocks are free and {len(unused)} are not used"
        assert not set(self._empty) & set(self._keys), "an empty block is published"
        assert {block: key for key, block in self._published.items()} == self._keys, (
            "keys and blocks disagree"
        )

    def _evict(self) -> int:
        block, _ = self._unused.popitem(last=False)
        del self._published[self._keys.pop(block)]
        return block
