"""What a machine is and what it could do at most, to be read beside what kernels reach."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from outrider.kernels.native import library

COPIED_BYTES = 64 << 20
PRODUCT_SIZE = 256
"""Rows and columns of matrices that stay in a core's cache while they are multiplied."""
TURNS = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of as many threads as PyTorch has now.

    copy: bytes per second, read and written, of a copy in memory. operations: per second, an addition and
    a multiplication being two, of a product in cache in float32 and in bfloat16, whichever is faster.
    """

    copy: float
    operations: float


def seconds_of(work: Callable[[], Any]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measured_limits() -> Limits:
    """The best of some turns each: what disturbs can only slow down."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8)
    into = torch.empty_like(source)
    copying = min(seconds_of(lambda: into.copy_(source)) for _ in range(TURNS))
    multiplying = min(_seconds_of_product(dtype) for dtype in (torch.float32, torch.bfloat16))
    return Limits(copy=2 * COPIED_BYTES / copying, operations=2 * PRODUCT_SIZE**3 / multiplying)


def _seconds_of_product(dtype: torch.dtype) -> float:
    matrix = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype)
    into = torch.empty_like(matrix)
    return min(seconds_of(lambda: torch.mm(matrix, matrix, out=into)) for _ in range(TURNS))


def description() -> dict[str, Any]:
    """Processor, versions, threads, and the instruction sets of the native kernels."""
    native, layers = library.load(), library.layers(torch.empty(0))
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "linears": native.selected() if native else None,
        "layers": layers.selected() if layers else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """As the system calls it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except FileNotFoundError:
        pass
    return platform.processor()
