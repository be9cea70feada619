"""What stands between a decoder's products, row by row: norm, residual and activation.

On CPU one native call each (``native/pointwise.hpp``), which rounds once where PyTorch's operators
round in between; otherwise PyTorch's.
"""

import torch
import torch.nn.functional as F

from outrider.kernels.native import library


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, add: torch.Tensor | None = None
) -> torch.Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` by rows, after ``add`` was added to ``x`` in place.

    x, add: ``[rows, size]``, contiguous. weight: ``[size]``, of the same dtype.
    """
    native = library.layers(x)
    if native is None:
        if add is not None:
            x += add
        return F.rms_norm(x, weight.shape, weight, eps)
    out = torch.empty_like(x)
    native.rms_norm(
        library.KINDS[x.dtype],
        x.data_ptr(),
        0 if add is None else add.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        *x.shape,
        eps,
    )
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` ``[rows, size]``; gate_up: ``[rows, 2 * size]``, contiguous."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    native = library.layers(gate_up)
    if native is None:
        return F.silu(gate_up[:, :size]).mul_(gate_up[:, size:])
    out = gate_up.new_empty(rows, size)
    native.silu_mul(library.KINDS[gate_up.dtype], gate_up.data_ptr(), out.data_ptr(), rows, size)
    return out
