"""Large arrays in huge pages: with small ones a virtual machine spends its time walking page tables."""

import math
import mmap
from contextlib import suppress

import torch

SIZE = 2 << 20
"""Bytes of a huge page; what is smaller gains nothing."""


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A zeroed tensor of the host's memory, in huge pages if the system has them.

    Pages are given when they are first written to.
    """
    count = math.prod(shape)
    length = count * dtype.itemsize
    # Linux alone knows the advice.
    if length < SIZE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, length + SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # of a kernel without them; nothing is lost but time
        memory.madvise(mmap.MADV_HUGEPAGE)
    # Where the system places it is not at a page's beginning.
    start = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % SIZE
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(shape)
