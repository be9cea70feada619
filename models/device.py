"""Where a network computes: on CPUs, or on one CUDA device."""

import os

import torch
from torch.distributed import is_nccl_available

from outrider.speculation.errors import InvalidConfigError

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
"""A process uses the first device that it sees; ``CUDA_VISIBLE_DEVICES`` says which that is. Of several ranks
on one machine each next one uses the next."""
DEVICES = ("auto", "cpu", "cuda")


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is CUDA where this process can use it, else the CPU.

    Raises:
        InvalidConfigError: there is no such name, or CUDA is asked for and cannot be used.
    """
    if name not in DEVICES:
        raise InvalidConfigError(f"device must be {', '.join(DEVICES[:-1])} or {DEVICES[-1]}, not {name!r}")
    if name == "cpu":
        return CPU
    if torch.cuda.is_available():
        return CUDA
    if name == "cuda":
        raise InvalidConfigError(f"device 'cuda' cannot be used: {_why_not()}")
    return CPU


def device_of(rank: int, first: torch.device) -> torch.device:
    """That of a rank of this machine, where rank 0 has the ``first``: the next ones that the process sees."""
    return first if first.type == "cpu" else torch.device(first.type, first.index + rank)


def check_devices(size: int, first: torch.device) -> None:
    """Refuses more ranks than there are devices for.

    Raises:
        InvalidConfigError: so it is, or they cannot be linked.
    """
    if first.type == "cpu" or size == 1:
        return
    if not is_nccl_available():
        raise InvalidConfigError(
            f"tensor_parallel_size {size} on device {first.type!r} needs NCCL, which this PyTorch "
            f"({torch.__version__}) was built without"
        )
    seen = torch.cuda.device_count()
    if first.index + size > seen:
        raise InvalidConfigError(
            f"tensor_parallel_size {size} needs a CUDA device for each rank, and this process sees {seen}"
        )


def take_device(device: torch.device) -> None:
    """Makes it the one that this thread's kernels, streams and copies are for."""
    if device.type != "cpu":
        torch.cuda.set_device(device)


def _why_not() -> str:
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) was built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible!r}"
    return f"this process sees no CUDA device{seen}"
