"""Stand-ins for what needs a device: CUDA's graphs, and the links of ranks."""

import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store

from outrider.models import decoder_loader, parallel
from outrider.models.device_link import DeviceLink
from outrider.models.kernel_set import Capture, Run
from outrider.models.triton_set import triton_set


def rerun(run: Run) -> tuple[Callable[[], None], torch.Tensor]:
    """A ``Capture``: a replay does everything again, and puts the result where the first one stood."""
    result = run()

    def replay() -> None:
        result.copy_(run())

    return replay, result


class GlooLink(DeviceLink):
    """A link over gloo, for which the host waits; so nothing is ever left to be done."""

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=parallel.LOOPBACK)]
        options._timeout = timeout
        self._group: Any = ProcessGroupGloo(PrefixStore("devices", store), rank, size, options)
        self._others = [each for each in range(size) if each != rank]
        super().__init__(self._group, size, mark=lambda: lambda: True)

    def close(self) -> None:
        """gloo's own ``abort`` does nothing; see ``RankGroup.abort``."""
        for rank in self._others:
            with contextlib.suppress(RuntimeError):
                self._group.recv([torch.empty(1)], rank, 1).wait(timedelta(milliseconds=1))


def open_link(
    device: torch.device,  # noqa: ARG001
    store: Store,
    rank: int,
    size: int,
    *,
    timeout: timedelta,
) -> DeviceLink:
    """In place of ``device_link.open_link``: CPUs are devices, too."""
    return GlooLink(store, rank, size, timeout)


def use(patch: pytest.MonkeyPatch, capture: Capture | None = None) -> None:
    """Ranks and decoders on CPUs do all that they would do on devices."""
    patch.setattr(parallel, "open_link", open_link)
    patch.setattr(decoder_loader, "kernels_for", lambda _: triton_set(capture=capture))
