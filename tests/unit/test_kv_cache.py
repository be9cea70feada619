"""Who owns which block of the KV pool."""

import numpy as np
import pytest
import torch

from outrider.models.kv_cache import BLOCK, NULL_SLOT, KVCache, KVSequence, blocks_for
from outrider.speculation.errors import OutOfBlocksError


def make_cache(blocks: int) -> KVCache:
    return KVCache(layers=2, kv_heads=1, head_dim=4, num_blocks=blocks, dtype=torch.float32)


def test_runs_are_consecutive_disjoint_and_never_the_null_block() -> None:
    cache = make_cache(10)
    first, second = cache.allocate(4), cache.allocate(6)
    assert first is not None
    assert second is not None
    assert sorted([*first, *second]) == list(range(1, 11))
    assert cache.allocate(1) is None


def test_a_freed_gap_is_used_again_only_if_it_is_long_enough() -> None:
    cache = make_cache(10)
    runs = [cache.allocate(2) for _ in range(5)]
    cache.free(runs[1])
    cache.free(runs[3])
    assert cache.num_free_blocks == 4
    assert cache.allocate(3) is None
    assert cache.allocate(2) == runs[1]


def test_freeing_twice_is_noticed() -> None:
    cache = make_cache(3)
    run = cache.allocate(2)
    cache.free(run)
    with pytest.raises(AssertionError, match="free already"):
        cache.free(run)


def test_a_leak_and_a_write_to_the_null_slot_are_noticed() -> None:
    cache = make_cache(4)
    sequence = KVSequence(cache, max_tokens=BLOCK, max_nodes=3)
    with pytest.raises(AssertionError, match="2 KV blocks leaked"):
        cache.check_idle()
    sequence.close()
    cache.check_idle()
    cache.pool[1, NULL_SLOT, 0, 0, 0] = 1
    with pytest.raises(AssertionError, match="null slot"):
        cache.check_idle()


def test_a_sequence_that_does_not_fit_says_so() -> None:
    with pytest.raises(OutOfBlocksError, match=r"97 tokens and 3 nodes .* 4 blocks"):
        KVSequence(make_cache(4), max_tokens=3 * BLOCK + 1, max_nodes=3)


def test_accepted_nodes_move_behind_the_text_in_path_order() -> None:
    cache = make_cache(8)
    other = KVSequence(cache, max_tokens=40, max_nodes=5)
    sequence = KVSequence(cache, max_tokens=70, max_nodes=40)
    cache.pool[:] = torch.arange(cache.pool.shape[1])[:, None, None, None].to(torch.float32)
    sequence.length = 30
    sequence.commit_nodes(np.array([2, 37, 5]))
    assert sequence.length == 33
    moved = cache.pool[1, sequence.base + 30 : sequence.base + 33, 1, 0, 0]
    assert moved.tolist() == [sequence.node_base + node for node in (2, 37, 5)]
    assert sequence.node_base >= sequence.base + 70
    assert other.node_base + 5 <= sequence.base
    sequence.commit_nodes(np.zeros(0, np.int64))
    assert sequence.length == 33


@pytest.mark.parametrize(("slots", "blocks"), [(0, 0), (1, 1), (BLOCK, 1), (BLOCK + 1, 2)])
def test_blocks_for(slots: int, blocks: int) -> None:
    assert blocks_for(slots) == blocks
