"""The set of Triton's kernels."""

import torch

from outrider.kernels.gpu import pointwise
from outrider.kernels.gpu.kv_move import kv_move
from outrider.kernels.gpu.path_attention import path_attention
from outrider.kernels.gpu.rotary import rotate_and_write
from outrider.kernels.gpu.tree_attention import tree_attention
from outrider.models.kernel_set import Capture, KernelSet, PagedKernels
from outrider.models.packed_batch import to_device


def triton_set(capture: Capture | None = None) -> KernelSet:
    """What a decoder on a device computes with; in Triton's interpreter it does so on CPU tensors."""
    return KernelSet(
        rms_norm=pointwise.rms_norm,
        silu_mul=pointwise.silu_mul,
        kv_move=_move,
        paged=PagedKernels(
            rotate_and_write=rotate_and_write, over_trees=tree_attention, over_paths=path_attention
        ),
        capture=capture,
    )


def _move(pool: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    count = len(source)
    # Both begin at multiples of 16 bytes, whatever their number: kernels are compiled for that.
    slots = torch.zeros(2, -(-count // 2) * 2, dtype=torch.int64)
    slots[0, :count], slots[1, :count] = source, target
    source, target = to_device(slots, pool.device)[:, :count]
    kv_move(pool, source, target)
