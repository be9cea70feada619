"""Starts draft workers on this machine, without Ray, and ends them."""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from outrider.actors.security import Security
from outrider.cluster.child import Child
from outrider.cluster.cluster_security import TOKEN_VARIABLE
from outrider.cluster.interruption import uninterrupted

STOP_SECONDS = 3.0


@dataclass(slots=True)
class _Worker(Child):
    """One process. address: where it listens; empty until it says so."""

    address: str = ""


class LocalWorkers:
    """Draft workers in processes of their own, each on a free port of the loopback interface.

    A worker ends when this process does, however that ends: it watches a pipe from it.
    security: what connecting to them takes, a fresh token.

    count: of workers. arguments: of ``outrider draft-worker``, without port and name.

    Raises:
        WorkerError: one could not start; the message holds what it said.
    """

    def __init__(self, count: int, arguments: Sequence[str]) -> None:
        self.security = Security(token=secrets.token_hex(16))
        self._arguments = list(arguments)
        self._workers: list[_Worker] = []
        self.statistics: list[dict[str, Any]] = []
        """After ``close``: what each worker that ended in good order says it did."""
        try:
            for index in range(count):
                with uninterrupted():
                    self._workers.append(self._start(index, 0))
                    self._workers[-1].listen()
            for worker in self._workers:
                worker.address = _announced_address(worker)
        except BaseException:
            self.close()
            raise

    @property
    def addresses(self) -> list[str]:
        """host:port of each."""
        return [worker.address for worker in self._workers]

    @property
    def pids(self) -> list[int]:
        """Process ids of each."""
        return [worker.process.pid for worker in self._workers]

    @property
    def ends(self) -> dict[str, str]:
        """How workers ended that have ended by themselves, for people, by their addresses."""
        return {worker.address: end for worker in self._workers if (end := worker.end)}

    def restart(self, index: int) -> None:
        """Ends one worker, if it still runs, and starts another on the same port.

        Raises:
            WorkerError: it could not start.
        """
        worker = self._workers[index]
        worker.process.kill()
        worker.finish()
        with uninterrupted():
            # The address stays, so that a restart that failed can be tried again.
            self._workers[index] = self._start(index, int(worker.address.rpartition(":")[2]))
            self._workers[index].address = worker.address
            self._workers[index].listen()
        _announced_address(self._workers[index])

    def close(self) -> None:
        """Ends all workers and waits until they are gone; may be called twice."""
        with uninterrupted():
            for worker in self._workers:
                # Their signal to stop; one that hangs is killed.
                assert worker.process.stdin is not None
                with contextlib.suppress(OSError):
                    worker.process.stdin.close()
                worker.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for worker in self._workers:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
            self.statistics += _last_words(worker)
            worker.finish()
        self._workers = []

    def _start(self, index: int, port: int) -> _Worker:
        command = [sys.executable, "-m", "outrider.cluster.cli.main", "draft-worker", *self._arguments]
        command += ["--port", str(port), "--name", f"draft-{index}", "--exit-with-stdin"]
        assert self.security.token is not None
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, TOKEN_VARIABLE: self.security.token},
            # Ctrl-C reaches the whole terminal group; workers end when their owner says so.
            start_new_session=True,
        )
        return _Worker(process)


def _announced_address(worker: _Worker) -> str:
    """Waits until it says where it listens."""
    address: str = json.loads(worker.first_line("a draft worker"))["address"]
    return address


def _last_words(worker: _Worker) -> list[dict[str, Any]]:
    """The statistics that a worker prints when it ends."""
    assert worker.process.stdout is not None
    if worker.process.stdout.closed:  # by a restart that then failed
        return []
    lines = [json.loads(line) for line in worker.process.stdout.read().splitlines()]
    return [line["statistics"] for line in lines if "statistics" in line]
