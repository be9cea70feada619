"""Checks on what sequences hold of a KV pool."""

import numpy as np
import torch

from outrider.models.block_pool import BLOCK
from outrider.models.kv_cache import IntArray, KVCache, KVSequence


def make_cache(blocks: int, numerics: str = "", window: int | None = None) -> KVCache:
    return KVCache(
        layers=2,
        kv_heads=1,
        head_dim=4,
        num_blocks=blocks,
        dtype=torch.float32,
        numerics=numerics,
        window=window,
    )


def write(cache: KVCache, sequence: KVSequence, text: IntArray) -> None:
    """Caches the rest of ``text``: each entry holds its token."""
    start = sequence.length
    assert sequence.reserve(len(text))
    slots = torch.from_numpy(sequence.slots(start, len(text)))
    cache.pool[:, slots] = torch.from_numpy(text[start:]).float()[None, :, None, None, None]
    sequence.length = len(text)
    sequence.publish(text)


def entries(cache: KVCache, sequence: KVSequence) -> list[int]:
    """Of all positions, but for those in blocks behind the window."""
    slots = sequence.slots(cache.blocks_behind(sequence.length) * BLOCK, sequence.length)
    held: list[int] = cache.pool[1, slots, 1, 0, 0].int().tolist()
    return held


def check_publishing() -> None:
    """Speculative entries are not published."""
    cache = make_cache(4)
    sequence = KVSequence(cache)
    text = np.arange(1, 2 * BLOCK + 1)
    write(cache, sequence, text[:BLOCK])
    assert sequence.reserve(2 * BLOCK)
    sequence.publish(text)
    again = KVSequence(cache)
    again.adopt(text)
    assert again.length == BLOCK


def check_forking() -> None:
    """A fork shares full blocks and copies the rest, so that neither writes into the other's text."""
    cache = make_cache(8)
    text = np.arange(1, 71)
    parent = KVSequence(cache)
    write(cache, parent, text)
    child = parent.fork(69)
    assert child is not None
    assert child.blocks[:2] == parent.blocks[:2]
    assert child.blocks[2] != parent.blocks[2]
    assert entries(cache, child) == text[:69].tolist()
    mine = np.append(text[:69], [500, 501])
    write(cache, child, mine)
    assert entries(cache, parent) == text.tolist()
    cache.check([parent.blocks, child.blocks])
    parent.close()
    assert entries(cache, child) == mine.tolist()
    child.close()
    cache.check_idle()
