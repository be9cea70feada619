"""What of a device's memory is free, and what a step takes of it; of several ranks', the scarcest."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from outrider.models.parallel import TensorParallel


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes. total: of the device. step: what a step takes beside weights and cache."""

    free: int
    total: int
    step: int


def measured(rehearse: Callable[[], None]) -> DeviceMemory:
    """This process's device, after a step that shows what steps take."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    rehearse()
    step = torch.cuda.max_memory_allocated() - before
    # What was asked of the device for it must not count twice.
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return DeviceMemory(free=free, total=total, step=step)


def scarcest(own: DeviceMemory, ranks: TensorParallel) -> DeviceMemory:
    """Figures with which every rank gets by."""
    taken, total, step = ranks.maximum((-own.free, own.total, own.step))
    return DeviceMemory(free=-taken, total=total, step=step)
