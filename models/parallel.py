"""The ranks of a tensor-parallel group, and how they tell each other what they computed.

Every transfer is a send or a receive of gloo's, from each rank to each other one. A rank adds up what
it got in the order of the ranks, so a sum's bits depend neither on the number of rows nor on who came
first (docs/numerics.md); and messages as small as those of a few rows are there sooner than through a ring.
"""

import contextlib
import socket
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore

from outrider.speculation.errors import TargetGroupError

IntArray = npt.NDArray[np.int64]
LOOPBACK = "127.0.0.1"
STEP_SECONDS = 60.0
"""Most time that a rank may be behind another one within a step."""
JOIN_SECONDS = 60.0
"""For ranks that have been started to find each other."""
START_SECONDS = 600.0
"""Most time that a rank may be behind another one in loading its part."""
_IDLE = timedelta(days=3650)
"""How long a follower waits for the next step. It ends with its connection to the leader."""
_AT_ONCE = 2048
"""Numbers in the first part of a message; few messages have another."""
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
    grace: seconds in which ``abort`` will have been called after a rank's end, if someone watches them;
        its reason is then told in place of what can be seen from here.

    Raises:
        TargetGroupError: not all ranks came in time.
    """

    def __init__(
        self,
        store: TCPStore,
        rank: int,
        size: int,
        *,
        host: str = LOOPBACK,
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

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """See ``TensorParallel``; in float32 or better, in the order of the ranks, rounded once."""
        first, *others = self._exchange(x, self._timeout)
        total = first.to(torch.promote_types(x.dtype, torch.float32))
        for part in others:
            total += part
        return total.to(x.dtype)

    def columns(self, x: torch.Tensor) -> torch.Tensor:
        """See ``TensorParallel``."""
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

    def abort(self, reason: str) -> None:
        """Ends the group, from any thread: whatever waits for another rank fails, here and there.

        reason: what the error says; that of the first call counts.
        """
        if self.leave(reason):
            # gloo's own abort() does nothing. A transfer that is out of time closes all connections, and
            # one with a rank that is gone already closes no other.
            for rank in self._others:
                with contextlib.suppress(RuntimeError):
                    self._group.recv([torch.empty(1)], rank, _ABORT).wait(timedelta(milliseconds=1))

    def leave(self, reason: str) -> bool:
        """Begins no more transfers, and fails with ``reason`` instead; whether it did not do so already."""
        with self._lock:
            if self._ended.is_set():
                return False
            self._reason = reason
            self._ended.set()
            return True

    def _exchange(self, x: torch.Tensor, timeout: timedelta) -> list[torch.Tensor]:
        """Every rank's ``x``, by rank."""
        parts = [x if each == self.rank else torch.empty_like(x) for each in range(self.size)]
        works = [self._send(x, each, _DATA) for each in self._others]
        works += [self._receive(parts[each], each, _DATA) for each in self._others]
        self._finish(works, timeout)
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
            raise self._lost(rank) from error
        return work

    def _finish(self, works: Sequence[tuple[int, _Work]], timeout: timedelta) -> None:
        for rank, work in works:
            try:
                work.wait(timeout)
            except RuntimeError as error:
                raise self._lost(rank) from error

    def _lost(self, rank: int) -> TargetGroupError:
        """What to raise when a transfer from or to ``rank`` failed."""
        # The rank that failed first may be another one, whose end this one did not survive.
        self._ended.wait(self._grace)
        self.abort(f"rank {rank} of the tensor-parallel group of {self.size} does not answer")
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
