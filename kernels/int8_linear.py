"""Linear layers with weights of eight bits, for drafters: half of bfloat16's bytes, and other numbers.

Weights are quantised once, symmetrically, with a float32 scale for each output. Rows keep their dtype, or 16
bits with a scale of their own, and sums are float32 or better, so a result is off by the rounding of weights
alone. On CPU a native kernel (``native/int8.hpp``) computes each row in one order, whatever stands beside it.
"""

import torch

from outrider.kernels.linear import Linear
from outrider.kernels.native import library

LARGEST = 127


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``[out, in]`` as int8 within ±127, and the float32 scale of each output ``[out]``.

    Their product is within half a scale of the weight; an output's largest weight becomes ±127.

    Raises:
        ValueError: a weight is infinite or not a number, so there is no scale.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if not wide.isfinite().all():
        raise ValueError("weights that are infinite or not numbers cannot be quantised")
    largest = wide.abs().amax(1) if wide.shape[1] else wide.new_zeros(len(wide))
    # Of an output without weights any scale will do, and none may vanish.
    scales = (largest / LARGEST).float().clamp_min(torch.finfo(torch.float32).tiny)
    return (wide / scales[:, None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scales


def int8_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """What ``Int8Linear`` computes, plainly: sums in float32 or better, scaled, rounded once.

    x: ``[rows, in]``. weight: int8 ``[out, in]``. scales: float32 ``[out]``. Result: ``[rows, out]``, in
    the dtype of x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    result = x.to(wide) @ weight.to(wide).T * scales.to(wide)
    return (result if bias is None else result + bias.to(wide)).to(x.dtype)


class Int8Linear(Linear):
    """A ``Linear`` that quantises the weights it is given; x has the dtype that they had.

    Raises:
        ValueError: see ``quantize_int8``.
    """

    __slots__ = ("_quantized",)

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self._dtype, self._bias = weight.dtype, bias
        quantized, scales = quantize_int8(weight)
        self.native = library.pack(quantized, bias, dtype=weight.dtype, scales=scales)
        self.packed = self.native is not None
        self._quantized = None if self.packed else (quantized, scales)

    def _plain_nbytes(self) -> int:
        return self.shape[0] * self.shape[1]

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        assert self._quantized is not None
        return int8_linear_reference(x, *self._quantized, self._bias)
