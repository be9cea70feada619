"""How ranks on devices tell each other what they computed, in the order of what devices are asked for.

The host only asks for an exchange, and goes on. So the death of another rank does not show here: it leaves
the device waiting, until the link is closed.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import AllgatherOptions, PrefixStore, Store

Mark = Callable[[], Callable[[], bool]]
"""Marks the end of what a device has been asked for so far: what tells whether it got there."""


class DeviceLink:
    """One rank's end of it.

    backend: one of PyTorch's, for this device. size: how many ranks. mark: see ``Mark``.
    """

    def __init__(self, backend: Any, size: int, mark: Mark) -> None:
        self._backend, self._size, self.mark = backend, size, mark

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """``[size, *x.shape]``, every rank's ``x`` ``[rows, ...]``, by rank.

        Raises:
            ConnectionError: the link is closed, or broken.
        """
        rows, *rest = x.shape
        parts = x.new_empty(self._size * rows, *rest)
        # In the stream of all else, so that neither has to wait for the other's.
        options = AllgatherOptions()
        options.asyncOp = False
        try:
            work = self._backend._allgather_base(parts, x.contiguous(), options)
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise ConnectionError(f"{error}") from error
        return parts.view(self._size, rows, *rest)

    def close(self) -> None:
        """Ends exchanges that wait for another rank, and leaves anything as their result; from any thread.

        Raises:
            RuntimeError: the backend could not end them.
        """
        self._backend.abort()


def open_link(
    device: torch.device, store: Store, rank: int, size: int, *, timeout: timedelta
) -> DeviceLink | None:
    """A link of the ranks that find each other in this store; None on CPUs, which have no need of one.

    timeout: after which PyTorch's watchdog ends a process whose exchange has not come about.

    Raises:
        RuntimeError, ConnectionError: NCCL refuses.
    """
    if device.type == "cpu":
        return None
    from torch._C._distributed_c10d import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    options.global_ranks_in_group = list(range(size))
    # Not torch.distributed's default group: there is one in a process, and a target and its draft model
    # may both be of several ranks.
    backend = ProcessGroupNCCL(PrefixStore("devices", store), rank, size, options)
    link = DeviceLink(backend, size, _mark)
    # What connects the devices, now that all ranks are there.
    link.gather(torch.zeros(1, device=device))
    return link


def _mark() -> Callable[[], bool]:
    cuda: Any = torch.cuda  # Partly without types.
    event = cuda.Event()
    event.record()
    query: Callable[[], bool] = event.query
    return query
