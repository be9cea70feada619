"""Moving accepted nodes' KV entries to the slots of their positions."""

import torch


def kv_move(pool: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copies entries ``source[i]`` to ``target[i]`` in every layer, in place.

    pool: ``[layers, slots, 2, kv_heads, head_dim]``.
    source, target: int64 ``[entries]``; all are read before any is written, so a slot may be both.
    """
    pool.index_copy_(1, target, pool.index_select(1, source))
