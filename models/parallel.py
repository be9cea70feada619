"""The ranks of a tensor-parallel group, and how they tell each other what they computed.

On CPUs every transfer is a send or a receive of gloo's, from each rank to each other one. A rank adds up what
it got in the order of the ranks, so a sum's bits depend neither on the number of rows nor on who came
first (docs/numerics.md); and messages as small as those of a few rows are there sooner than through a ring.
On devices NCCL carries what is computed (``device_link``), to the same sums; what ranks have to say goes
over gloo there, too.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore

from outrider.models.device import CPU
from outrider.models.device_link import DeviceLink, open_link
from outrider.speculation.errors import TargetGroupError

IntArray = npt.NDArray[np.int64]
LOOPBACK = "127.0.0.1"
STEP_SECONDS = 60.0
"""Most time that a rank may be behind another one within a step."""
JOIN_SECONDS = 60.0
"""For ranks that have been started to find each other."""
WATCHDOG_FACTOR = 2
"""After so many times as long PyTorch ends a process that its device keeps from giving up by itself."""
START_SECONDS = 600.0
"""Most time that a rank may be behind another one in loading its part."""
_IDLE = timedelta(days=3650)
"""How long a follower waits for the next step. It ends with its connection to the leader."""
_AT_ONCE = 2048
"""Numbers in the first part of a message; few messages have another."""
_LOOK_SECONDS = 2e-5
"""Between two looks at a device that has yet to finish."""
_DATA, _STEPS, _ABORT = range(3)
"""What keeps transfers between the same two ranks apart."""


class TensorParallel:
    """What the parts of a network need of the other ranks; here there are none.

    rank: which part of the network this process holds, of ``size``. Rank 0 leads.
    """

    rank = 0
    size = 1

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' ``x``, of equal shapes; ``x`` may be overwritten."""
        return x

    def columns(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' ``x`` ``[rows, columns]`` side by side at rank 0, and ``x`` itself elsewhere."""
        return x

    def maximum(self, values: Sequence[int]) -> list[int]:
        """The greatest of all ranks' values, one by one."""
        return list(values)


ALONE = TensorParallel()


class _Work(Protocol):
    """A transfer in progress."""

    def wait(self, timeout: timedelta) -> bool: ...


class RankGroup(TensorParallel):
    """One rank of several processes. The constructor returns when all of them have come.

    store: where the ranks find each other, see ``open_store``.
    host: the address of an interface through which the others reach this rank.
    device: where this rank computes; one that no other rank has, or the CPU for all of them.
    grace: seconds in which ``abort`` will have been called after a rank's end, if someone watches them;
        its reason is then told in place of what can be seen from here.

    Raises:
        TargetGroupError: not all ranks came in time, or their devices cannot be linked.
    """

    def __init__(
        self,
        store: TCPStore,
        rank: int,
        size: int,
        *,
        host: str = LOOPBACK,
        device: torch.device = CPU,
        timeout: float = STEP_SECONDS,
        grace: float = 0.0,
    ) -> None:
        self.rank, self.size = rank, size
        self._others = [each for each in range(size) if each != rank]
        self._timeout, self._grace = timedelta(seconds=timeout), grace
        self._lock, self._ended, self._reason = threading.Lock(), threading.Event(), ""
        # The public constructor would listen on whatever the machine's name resolves to.
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._threads = 1
        options._timeout = timedelta(seconds=JOIN_SECONDS)
        # A group that came to nothing may stand in the store under the same name without it.
        self._store = PrefixStore(f"ranks of {size}", store)
        try:
            self._group: Any = ProcessGroupGloo(self._store, rank, size, options)
        except RuntimeError as error:
            raise TargetGroupError(f"rank {rank} could not reach the others of {size}") from error
        self._link: DeviceLink | None = None
        self._link = self._linked(device)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """See ``TensorParallel``; in float32 or better, in the order of the ranks, rounded once."""
        first, *others = self._exchange(x, self._timeout) if self._link is None else self._gather(x)
        total = first.to(torch.promote_types(x.dtype, torch.float32))
        for part in others:
            total += part
        return total.to(x.dtype)

    def columns(self, x: torch.Tensor) -> torch.Tensor:
        """See ``TensorParallel``."""
        if self._link is not None:
            gathered = self._gather(x)
            return x if self.rank else torch.cat(gathered.unbind(), dim=1)
        if self.rank:
            self._finish([self._send(x, 0, _DATA)], self._timeout)
            return x
        parts = [x, *(torch.empty_like(x) for _ in self._others)]
        self._finish([self._receive(parts[each], each, _DATA) for each in self._others], self._timeout)
        return torch.cat(parts, dim=1)

    def maximum(self, values: Sequence[int]) -> list[int]:
        """See ``TensorParallel``; waits for ranks that are still loading."""
        parts = self._exchange(torch.tensor(values), timedelta(seconds=START_SECONDS))
        greatest: list[int] = torch.stack(parts).amax(0).tolist()
        return greatest

    def tell(self, message: IntArray, *, timeout: float | None = None) -> None:
        """Gives the other ranks, who must ``hear``, a message of rank 0's."""
        seconds = self._timeout if timeout is None else timedelta(seconds=timeout)
        framed = np.zeros(max(_AT_ONCE, 1 + len(message)), np.int64)
        framed[0] = len(message)
        framed[1 : 1 + len(message)] = message
        parts = [torch.from_numpy(framed[:_AT_ONCE]), torch.from_numpy(framed[_AT_ONCE:])]
        works = [self._send(part, each, _STEPS) for each in self._others for part in parts if len(part)]
        self._finish(works, seconds)

    def hear(self) -> IntArray:
        """The next message of rank 0's, however long it takes.

        Raises:
            TargetGroupError: rank 0 is gone.
        """
        start = torch.empty(_AT_ONCE, dtype=torch.int64)
        self._finish([self._receive(start, 0, _STEPS)], _IDLE)
        left = int(start[0]) + 1 - _AT_ONCE
        if left > 0:
            rest = torch.empty(left, dtype=torch.int64)
            self._finish([self._receive(rest, 0, _STEPS)], self._timeout)
            start = torch.cat((start, rest))
        message: IntArray = start[1 : 1 + int(start[0])].numpy()
        return message

    def settle(self) -> None:
        """Waits until this rank's device has done what it was asked for.

        Only then is it known that no rank was lost meanwhile: an exchange that was ended left anything
        behind. On CPUs nothing is left to wait for.

        Raises:
            TargetGroupError: another rank was lost, or is too late.
        """
        if self._link is None:
            return
        is_done, deadline = self._link.mark(), time.monotonic() + self._timeout.total_seconds()
        while not is_done() and not self._ended.is_set():
            if time.monotonic() > deadline:
                raise self._lost("a rank")
            time.sleep(_LOOK_SECONDS)
        if self._ended.is_set():
            raise TargetGroupError(self._reason)

    def abort(self, reason: str) -> None:
        """Ends the group, from any thread: whatever waits for another rank fails, here and there.

        reason: what the error says; that of the first call counts.
        """
        if self._leave(reason):
            # gloo's own abort() does nothing. A transfer that is out of time closes all connections, and
            # one with a rank that is gone already closes no other.
            for rank in self._others:
                with contextlib.suppress(RuntimeError):
                    self._group.recv([torch.empty(1)], rank, _ABORT).wait(timedelta(milliseconds=1))
            self._close_link()

    def leave(self, reason: str) -> None:
        """Begins no more transfers, and fails with ``reason`` instead."""
        if self._leave(reason):
            self._close_link()

    def _leave(self, reason: str) -> bool:
        """Whether this was the first reason to."""
        with self._lock:
            if self._ended.is_set():
                return False
            self._reason = reason
            self._ended.set()
            return True

    def _linked(self, device: torch.device) -> DeviceLink | None:
        """The link of all ranks' devices; None where all of them are CPUs."""
        some, others = self.maximum((device.type != "cpu", device.type == "cpu"))
        if some and others:
            raise TargetGroupError(f"some of the {self.size} ranks compute on a CUDA device and some do not")
        watchdog = WATCHDOG_FACTOR * self._timeout
        try:
            return open_link(device, self._store, self.rank, self.size, timeout=watchdog)
        except (RuntimeError, ConnectionError) as error:
            said = " ".join(f"{error}".split())
            raise TargetGroupError(f"rank {self.rank} could not link {device} to others: {said}") from error

    def _close_link(self) -> None:
        if self._link is not None:
            # What cannot be ended in time ends with the process.
            with contextlib.suppress(RuntimeError):
                self._link.close()

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's ``x``, by rank, once the device has come to it."""
        assert self._link is not None
        if self._ended.is_set():
            raise TargetGroupError(self._reason)
        try:
            return self._link.gather(x)
        except ConnectionError as error:
            raise self._lost("a rank") from error

    def _exchange(self, x: torch.Tensor, timeout: timedelta) -> list[torch.Tensor]:
        """Every rank's ``x``, by rank."""
        parts = [x if each == self.rank else torch.empty_like(x) for each in range(self.size)]
        sent = [self._send(x, each, _DATA) for each in self._others]
        received = [self._receive(parts[each], each, _DATA) for each in self._others]
        # In this order: where a rank is gone, gloo fails what is to be received from it, but forgets what was
        # being sent when the connection broke.
        self._finish([*received, *sent], timeout)
        return parts

    def _send(self, x: torch.Tensor, rank: int, tag: int) -> tuple[int, _Work]:
        return rank, self._start(self._group.send, x, rank, tag)

    def _receive(self, x: torch.Tensor, rank: int, tag: int) -> tuple[int, _Work]:
        return rank, self._start(self._group.recv, x, rank, tag)

    def _start(self, verb: Any, x: torch.Tensor, rank: int, tag: int) -> _Work:
        if self._ended.is_set():
            raise TargetGroupError(self._reason)
        try:
            work: _Work = verb([x], rank, tag)
        except RuntimeError as error:
            raise self._lost(f"rank {rank}") from error
        return work

    def _finish(self, works: Sequence[tuple[int, _Work]], timeout: timedelta) -> None:
        for rank, work in works:
            try:
                work.wait(timeout)
            except RuntimeError as error:
                raise self._lost(f"rank {rank}") from error

    def _lost(self, who: str) -> TargetGroupError:
        """What to raise when a transfer from or to this rank failed."""
        # The rank that failed first may be another one, whose end this one did not survive.
        self._ended.wait(self._grace)
        self.abort(f"{who} of the tensor-parallel group of {self.size} does not answer")
        return TargetGroupError(self._reason)


def open_store(host: str = LOOPBACK) -> TCPStore:
    """A store in this process, rank 0, on a free port of the interface with this address."""
    # Listening already, so that nobody can take the port; TCPStore itself would listen everywhere.
    listening = socket.create_server((host, 0))
    port = listening.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
        timeout=timedelta(seconds=JOIN_SECONDS),
    )


def find_store(host: str, port: int) -> TCPStore:
    """The store that rank 0 has opened.

    Raises:
        TargetGroupError: it cannot be reached.
    """
    try:
        return TCPStore(host, port, wait_for_workers=False, timeout=timedelta(seconds=JOIN_SECONDS))
    except RuntimeError as error:
        raise TargetGroupError(f"no tensor-parallel group can be found at {host}:{port}") from error
