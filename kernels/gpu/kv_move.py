"""Moving accepted nodes' KV entries, in all layers with one launch."""

import torch
import triton
import triton.language as tl

_TILE = 8192


def kv_move(pool: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copies entries ``source[i]`` to ``target[i]`` in every layer, in place.

    pool: ``[layers, slots, 2, kv_heads, head_dim]``, contiguous.
    source, target: int64 ``[entries]``; all are read before any is written, so a slot may be both.
    """
    size, count = pool[0, 0].numel(), len(source)
    if count:
        entries = triton.next_power_of_2(count)
        block = max(32, min(_TILE // entries, triton.next_power_of_2(size)))
        grid = (len(pool), triton.cdiv(size, block))
        _kv_move[grid](pool, source, target, pool.shape[1], size, count, ENTRIES=entries, BLOCK=block)


@triton.jit
def _kv_move(
    pool: tl.tensor,
    source: tl.tensor,
    target: tl.tensor,
    slots: int,
    size: int,
    count: int,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    layer = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, ENTRIES)
    numbers = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = (entry < count)[:, None] & (numbers < size)[None, :]
    column = pool + layer * slots * size + numbers[None, :]
    moved = tl.load(column + tl.load(source + entry, mask=entry < count)[:, None] * size, mask=real)
    # What one thread writes another one may have yet to read.
    tl.debug_barrier()
    tl.store(column + tl.load(target + entry, mask=entry < count)[:, None] * size, moved, mask=real)
