"""What stands between a decoder's products, row by row; everything is float32 and rounded once."""

import torch
import triton
import triton.language as tl

_BLOCK = 1024
"""Numbers of one program where rows need not be seen whole."""


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, add: torch.Tensor | None = None
) -> torch.Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` by rows, after ``add`` was added to ``x`` in place.

    x, add: ``[rows, size]``, contiguous. weight: ``[size]``, of the same dtype.
    """
    out = torch.empty_like(x)
    rows, size = x.shape
    width = triton.next_power_of_2(size)
    _rms_norm[(rows,)](
        x,
        x if add is None else add,
        weight,
        out,
        size,
        eps,
        WIDTH=width,
        ADD=add is not None,
        num_warps=min(16, max(1, width // 512)),
    )
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` ``[rows, size]``; gate_up: ``[rows, 2 * size]``, contiguous."""
    rows, size = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    _silu_mul[(rows, triton.cdiv(size, _BLOCK))](gate_up, out, size, BLOCK=_BLOCK)
    return out


@triton.jit
def _rms_norm(
    x: tl.tensor,
    add: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    size: int,
    eps: float,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    columns = tl.arange(0, WIDTH)
    real = columns < size
    at = tl.program_id(0).to(tl.int64) * size + columns
    numbers = tl.load(x + at, mask=real, other=0.0)
    if ADD:
        more = tl.load(add + at, mask=real, other=0.0)
        # What is normed is the sum as it stands in x, rounded.
        numbers = (numbers.to(tl.float32) + more.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + at, numbers, mask=real)
    wide = numbers.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide) / size + eps)
    weights = tl.load(weight + columns, mask=real, other=0.0).to(tl.float32)
    tl.store(out + at, (wide * scale * weights).to(out.dtype.element_ty), mask=real)


@triton.jit
def _silu_mul(gate_up: tl.tensor, out: tl.tensor, size: int, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = columns < size
    gate = tl.load(gate_up + row * 2 * size + columns, mask=real, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + columns, mask=real, other=0.0).to(tl.float32)
    # The exponential overflows below -88, and what is divided by infinity is 0, as it should be.
    product = tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up
    tl.store(out + row * size + columns, product.to(out.dtype.element_ty), mask=real)
