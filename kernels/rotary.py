"""From projected heads to what attention takes: a plain reference.

R rows, H query heads, G key/value heads, D head size, N slots.
"""

import torch
import torch.nn.functional as F


def rotate_and_write_reference(
    heads: torch.Tensor,
    norm: torch.Tensor | None,
    eps: float,
    turns: torch.Tensor,
    slots: torch.Tensor,
    pool: torch.Tensor,
) -> torch.Tensor:
    """Norms and turns heads, writes keys and values into their slots, returns queries ``[R, H, D]``.

    heads: ``[R, (H + 2 G) * D]``: queries, keys, values; what rotates together stands in pairs.
    norm: ``[H + G, D]``, weights of the queries' and keys' norms, or None.
    turns: complex ``[R, 2, D / 2]``, of queries (scaled by 1/sqrt(D)) and of keys.
    slots: ``[R]``, all different. pool: ``[N, 2, G, D]``, one layer's keys and values; what is written
    and returned is computed in float32 or better and rounded once to its dtype.
    """
    rows, (_, _, G, D) = len(heads), pool.shape
    wide = torch.promote_types(heads.dtype, torch.float32)
    wide_heads = heads.view(rows, -1, D).to(wide)
    turning, values = wide_heads[:, :-G], wide_heads[:, -G:]
    if norm is not None:
        turning = F.rms_norm(turning, (D,), None, eps) * norm.to(wide)
    H = turning.shape[1] - G
    each = torch.cat((turns[:, :1].expand(-1, H, -1), turns[:, 1:].expand(-1, G, -1)), 1)
    pairs = torch.view_as_complex(turning.reshape(rows, H + G, D // 2, 2).contiguous())
    turned = torch.view_as_real(pairs * each).reshape(rows, H + G, D)
    pool[slots] = torch.stack((turned[:, H:], values), 1).to(pool.dtype)
    return turned[:, :H].to(pool.dtype)
