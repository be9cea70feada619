"""Linear layers for few rows, with weights packed once at load.

On CPU oneDNN's blocked weight layout halves the time of a step of a few rows, and its
kernels were found to give a row the same bits whatever the number of rows (plain
``F.linear`` does so only for multiples of four rows; docs/numerics.md).

Not with AMX, whose tiles sum in an order that depends on the number of rows: there 64 rows
would have to be computed for every one. So oneDNN is asked to stay below AMX, which it reads
once, before its first product; whoever sets the variable decides for himself, and the
start-up probe finds out what rows then cost.
"""

import os

import torch
import torch.nn.functional as F

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN packs weights of this device and dtype."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32


class Linear:
    """``x @ weight.T + bias``; weight ``[out, in]``, x ``[rows, in]`` contiguous, result ``[rows, out]``."""

    __slots__ = ("bias", "packed", "shape", "weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self.bias = bias
        self.packed = can_pack(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.packed else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed:
            result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self.weight, self.bias, "none", [], ""
            )
            return result
        return F.linear(x, self.weight, self.bias)
