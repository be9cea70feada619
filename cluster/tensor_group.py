"""A target whose parts several processes of this machine hold, without Ray."""

import contextlib
import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import torch

from outrider.actors.target_worker import TargetLeader
from outrider.cluster.child import Child
from outrider.cluster.interruption import uninterrupted
from outrider.cluster.target_rank import RankSettings
from outrider.models.config import load_config
from outrider.models.device import CPU, check_devices, device_of
from outrider.models.loader import load_model
from outrider.models.numerics import Numerics
from outrider.models.parallel import LOOPBACK, RankGroup, open_store
from outrider.models.resolve import resolve_model
from outrider.models.sharding import check_divisible

GRACE_SECONDS = 1.0
"""For the thread that waits for a rank's end to say how it ended."""
STOP_SECONDS = 3.0


class LocalRanks:
    """A target of ``size`` ranks: rank 0 in this process, the others in children of it.

    Each has its share of PyTorch's threads, this process too, until ``close``, and on CUDA a device of its
    own, this process the first that it sees. A rank that ends before
    makes every later forward fail; the others end by themselves, as they do when this process ends.

    model: as for ``load_model``, whose decoder is only rank 0's part. leader: runs all of them.

    Raises:
        InvalidConfigError: the network cannot be divided by ``size``, there are fewer devices, or as for
            ``load_model``.
        ModelError: it cannot be loaded.
        WorkerError: a rank could not start.
        TargetGroupError: a rank ended while it loaded its part; the message holds what it said.
    """

    def __init__(
        self,
        model: str,
        size: int,
        *,
        dtype: str,
        numerics: Numerics,
        max_model_len: int | None,
        device: torch.device = CPU,
        quantization: str | None = None,
    ) -> None:
        check_devices(size, device)
        folder = resolve_model(model)
        # What every rank would refuse is refused before one is started.
        check_divisible(load_config(folder), size)
        self.leader: TargetLeader | None = None
        self._ranks: RankGroup | None = None
        self._threads = torch.get_num_threads()
        self._children: list[Child] = []
        share = max(1, self._threads // size)
        store = open_store()
        settings = RankSettings(
            rank=0, size=size, host=LOOPBACK, port=store.port, model=str(folder), dtype=dtype,
            numerics=str(numerics), max_model_len=max_model_len, threads=share, device=str(device),
            quantization=quantization,
        )  # fmt: skip
        try:
            self._start_others(settings, device)
            self._ranks = RankGroup(store, 0, size, device=device, grace=GRACE_SECONDS)
            self._watch_others(self._ranks)
            torch.set_num_threads(share)
            self.model = load_model(
                str(folder),
                dtype=dtype,
                numerics=numerics,
                max_model_len=max_model_len,
                ranks=self._ranks,
                device=device,
                quantization=quantization,
            )
            self.leader = TargetLeader(self.model.decoder, self._ranks)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks from 1 on."""
        return [child.process.pid for child in self._children]

    def abort(self, reason: str) -> None:
        """Makes what waits for another rank fail, and what is asked later, from any thread."""
        assert self._ranks is not None
        self._ranks.abort(reason)

    def close(self) -> None:
        """Ends the other ranks and waits until they are gone; may be called twice."""
        if self.leader is not None:
            self.leader.stop()
        with uninterrupted():
            for child in self._children:
                # Their signal to stop, whatever they are doing; one that hangs is killed.
                assert child.process.stdin is not None
                with contextlib.suppress(OSError):
                    child.process.stdin.close()
        deadline = time.monotonic() + STOP_SECONDS
        for child in self._children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
            child.finish()
        if self._children:
            torch.set_num_threads(self._threads)
        self._children = []

    def _start_others(self, settings: RankSettings, first: torch.device) -> None:
        for rank in range(1, settings.size):
            own = {"rank": rank, "device": str(device_of(rank, first))}
            with uninterrupted():
                self._children.append(_started({**asdict(settings), **own}))
                self._children[-1].listen()
        for rank, child in enumerate(self._children, 1):
            child.first_line(f"rank {rank} of the tensor-parallel target")

    def _watch_others(self, ranks: RankGroup) -> None:
        def watch(rank: int, child: Child) -> None:
            child.process.wait()
            ranks.abort(f"rank {rank} of the tensor-parallel target {child.end}")

        for rank, child in enumerate(self._children, 1):
            threading.Thread(target=watch, args=(rank, child), daemon=True).start()


def _started(settings: dict[str, object]) -> Child:
    process = subprocess.Popen(
        [sys.executable, "-m", "outrider.cluster.target_rank", json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Ctrl-C reaches the whole terminal group; ranks end when rank 0 says so.
        start_new_session=True,
    )
    return Child(process)
