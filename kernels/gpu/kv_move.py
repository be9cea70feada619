"""Moving accepted nodes' KV entries, in all layers with one launch."""

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def kv_move(pool: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copies entries ``source[i]`` to ``target[i]`` in every layer, in place.

    pool: ``[layers, slots, 2, kv_heads, head_dim]``, contiguous.
    source, target: int64 ``[entries]``; no slot stands in both, so order does not matter.
    """
    size = pool[0, 0].numel()
    if len(source):
        grid = (len(source), len(pool), triton.cdiv(size, _BLOCK))
        _kv_move[grid](pool, source, target, pool.shape[1], size, BLOCK=_BLOCK)


@triton.jit
def _kv_move(
    pool: tl.tensor, source: tl.tensor, target: tl.tensor, slots: int, size: int, BLOCK: tl.constexpr
) -> None:
    entry, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    numbers = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    real = numbers < size
    entries = pool + layer * slots * size + numbers
    moved = tl.load(entries + tl.load(source + entry) * size, mask=real)
    tl.store(entries + tl.load(target + entry) * size, moved, mask=real)
