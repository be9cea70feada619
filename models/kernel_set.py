"""What a decoder computes with beside its products: one set of operations per kind of device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from outrider.kernels import pointwise
from outrider.kernels.kv_move import kv_move
from outrider.kernels.paged_attention import PagedPaths, TreeKeys
from outrider.speculation.errors import InvalidConfigError


class RmsNorm(Protocol):
    """See ``kernels/pointwise.rms_norm``."""

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, add: torch.Tensor | None = None
    ) -> torch.Tensor: ...


SiluMul: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""See ``kernels/pointwise.silu_mul``."""
KVMove: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""See ``kernels/kv_move.kv_move``; source and target stand on the CPU."""
Run: TypeAlias = Callable[[], torch.Tensor]
Capture: TypeAlias = Callable[[Run], tuple[Callable[[], None], torch.Tensor]]
"""Records what a function does on a device: what does the same again, and the result that it fills."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedKernels:
    """Attention over a pool on a device, by what ``kernels/paged_attention`` defines."""

    rotate_and_write: Callable[
        [torch.Tensor, torch.Tensor | None, float, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
    ]
    over_trees: Callable[[torch.Tensor, torch.Tensor, TreeKeys, int, torch.Tensor], torch.Tensor]
    over_paths: Callable[[torch.Tensor, torch.Tensor, PagedPaths, int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSet:
    """The operations of one kind of device; ``kernels/linear`` finds out for itself.

    paged: None where attention is that of CPUs (``Decoder``). capture: None where steps are always
    run operation by operation.
    """

    rms_norm: RmsNorm
    silu_mul: SiluMul
    kv_move: KVMove
    paged: PagedKernels | None = None
    capture: Capture | None = None


ON_CPU = KernelSet(rms_norm=pointwise.rms_norm, silu_mul=pointwise.silu_mul, kv_move=kv_move)


def kernels_for(device: torch.device) -> KernelSet:
    """The set of a device.

    Raises:
        InvalidConfigError: it needs Triton, which is not installed.
    """
    if device.type == "cpu":
        return ON_CPU
    try:
        from outrider.models.triton_set import triton_set
    except ModuleNotFoundError as error:
        raise InvalidConfigError(f"device {device.type!r} needs the package {error.name}") from None
    from outrider.models.cuda_graphs import CudaCapture

    return triton_set(capture=CudaCapture())
