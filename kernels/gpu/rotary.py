"""Norm and rotation of heads, and the writing of keys and values, in one launch."""

import torch
import triton
import triton.language as tl


def rotate_and_write(
    heads: torch.Tensor,
    norm: torch.Tensor | None,
    eps: float,
    turns: torch.Tensor,
    slots: torch.Tensor,
    pool: torch.Tensor,
) -> torch.Tensor:
    """Queries ``[R, H, D]``; keys and values go to ``pool``. See ``rotate_and_write_reference``.

    All contiguous; turns: complex64. Everything is computed in float32.
    """
    R, (_, _, G, D) = len(heads), pool.shape
    H = heads.shape[1] // D - 2 * G
    q = pool.new_empty(R, H, D)
    _rotate[(R, H + 2 * G)](
        heads,
        heads if norm is None else norm,
        eps,
        torch.view_as_real(turns),
        slots,
        q,
        pool,
        H=H,
        G=G,
        D=D,
        PAIRS=triton.next_power_of_2(D // 2),
        NORMED=norm is not None,
        num_warps=1,
    )
    return q


@triton.jit
def _rotate(
    heads: tl.tensor,
    norm: tl.tensor,
    eps: float,
    turns: tl.tensor,
    slots: tl.tensor,
    q: tl.tensor,
    pool: tl.tensor,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    NORMED: tl.constexpr,
) -> None:
    """One head of one row."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, PAIRS)
    real = pair < D // 2
    source = heads + (row * (H + 2 * G) + head) * D + 2 * pair
    even = tl.load(source, mask=real, other=0.0).to(tl.float32)
    odd = tl.load(source + 1, mask=real, other=0.0).to(tl.float32)
    entry = pool + tl.load(slots + row).to(tl.int64) * (2 * G * D) + 2 * pair
    if head >= H + G:
        _store_pairs(entry + (head - H) * D, even, odd, real)
        return

    if NORMED:
        mean = tl.sum(even * even + odd * odd) / D
        scale = 1.0 / tl.sqrt_rn(mean + eps)
        even *= scale * tl.load(norm + head * D + 2 * pair, mask=real, other=0.0).to(tl.float32)
        odd *= scale * tl.load(norm + head * D + 2 * pair + 1, mask=real, other=0.0).to(tl.float32)
    turn = turns + (row * 2 + (head >= H).to(tl.int32)) * D + 2 * pair
    cosine = tl.load(turn, mask=real, other=0.0)
    sine = tl.load(turn + 1, mask=real, other=0.0)
    turned_even, turned_odd = even * cosine - odd * sine, even * sine + odd * cosine
    if head < H:
        _store_pairs(q + (row * H + head) * D + 2 * pair, turned_even, turned_odd, real)
    else:
        _store_pairs(entry + (head - H) * D, turned_even, turned_odd, real)


@triton.jit
def _store_pairs(target: tl.tensor, even: tl.tensor, odd: tl.tensor, real: tl.tensor) -> None:
    tl.store(target, even.to(target.dtype.element_ty), mask=real)
    tl.store(target + 1, odd.to(target.dtype.element_ty), mask=real)
