"""Linear layers for few rows, with weights packed once at load.

On CPU a native kernel (``native/linear.cpp``) reads each weight once for all rows, at memory
speed, and gives a row the same bits whatever the number of rows and threads (docs/numerics.md).

Where it was not built, oneDNN's blocked weight layout is used. It halves the time of plain
``F.linear`` for few rows, and its kernels were found to be as independent of the number of rows,
but not with AMX, whose tiles sum in an order that depends on it: there 64 rows would have to be
computed for every one. So oneDNN is then asked to stay below AMX, which it reads once, before
its first product; whoever sets the variable decides for himself, and the start-up probe finds
out what rows then cost.
"""

import os

import torch
import torch.nn.functional as F

from outrider.kernels.native import library

if library.load() is None:
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


def can_pack(weight: torch.Tensor) -> bool:
    """Whether weights of this device and dtype are packed, natively or by oneDNN."""
    if weight.device.type != "cpu" or weight.dtype not in library.KINDS:
        return False
    return library.load() is not None or can_pack_with_onednn(weight)


def can_pack_with_onednn(weight: torch.Tensor) -> bool:
    """Whether oneDNN packs weights of this device and dtype."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What ``Linear`` computes, plainly: sums in float32 or better, rounded once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    result = x.to(wide) @ weight.to(wide).T
    return (result if bias is None else result + bias.to(wide)).to(weight.dtype)


class Linear:
    """``x @ weight.T + bias``; weight ``[out, in]``, x ``[rows, in]`` contiguous, result ``[rows, out]``.

    packed: the weights stand in a layout of their own, and the given tensor is not kept.
    native: the native kernel's, or None.
    """

    __slots__ = ("_bias", "_dtype", "_weight", "native", "packed", "shape")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self._dtype, self._bias = weight.dtype, bias
        self.native = library.pack(weight, bias)
        self._weight = weight if self.native is None else weight.new_empty(0)
        self.packed = self.native is not None
        if not self.packed and can_pack_with_onednn(weight):
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)
            self.packed = True

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a call reads: fewer than they had where the native kernel's are compact."""
        return self._plain_nbytes() if self.native is None else self.native.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        native = self.native
        if native is not None:
            outs, ins = self.shape
            rows = x.shape[0]
            # The kernel gets bare addresses.
            if x.shape != (rows, ins) or x.dtype is not self._dtype or not x.is_cpu:
                raise ValueError(f"{x.dtype} {tuple(x.shape)} for {self._dtype} weights {self.shape}")
            if not x.is_contiguous():
                x = x.contiguous()
            y = x.new_empty((rows, outs))
            native(x.data_ptr(), y.data_ptr(), rows, torch.get_num_threads())
            return y
        return self._plain(x)

    def _plain_nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self._dtype.itemsize

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        """Without the native kernel."""
        if self.packed:
            result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self._weight, self._bias, "none", [], ""
            )
            return result
        return F.linear(x, self._weight, self._bias)
