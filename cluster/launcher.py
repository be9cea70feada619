"""Starts draft workers on this machine, without Ray, and ends them."""

import contextlib
import json
import os
import secrets
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from outrider.actors.security import Security
from outrider.cluster.cluster_security import TOKEN_VARIABLE
from outrider.cluster.interruption import uninterrupted
from outrider.speculation.errors import WorkerError

START_SECONDS = 120.0
"""For a worker to load its model."""
STOP_SECONDS = 3.0
MAX_COMPLAINT_LINES = 20


@dataclass(slots=True)
class _Worker:
    """One process. address: where it listens; empty until it says so.

    complaints: the last lines of its standard error, which ``listener`` reads.
    """

    process: subprocess.Popen[str]
    address: str = ""
    complaints: list[str] = field(default_factory=list)
    listener: threading.Thread | None = None

    def listen(self) -> None:
        """Keeps the last lines of standard error from now on, so that the pipe never fills."""
        listener = threading.Thread(target=self._read_complaints, daemon=True)
        listener.start()
        # Not sooner: one that could not start cannot be joined.
        self.listener = listener

    def _read_complaints(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.complaints.append(line.rstrip())
            del self.complaints[:-MAX_COMPLAINT_LINES]

    @property
    def end(self) -> str:
        """How it ended, for people, or nothing while it runs."""
        code = self.process.poll()
        if code is None:
            return ""
        if self.listener is not None:
            # Its last words may still be on their way.
            self.listener.join(1.0)
        prefix = "outrider: error: "
        errors = [line.removeprefix(prefix) for line in self.complaints if line.startswith(prefix)]
        said = (errors or self.complaints or [""])[-1]
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"{how}: {said}" if said else how


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
        _finish(worker)
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
            _finish(worker)
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
    assert worker.process.stdout is not None
    # Without a thread that could outlive a Ctrl-C; the address is one line, written at once.
    # Unlike select(), poll() knows descriptors beyond 1023.
    poll = select.poll()
    poll.register(worker.process.stdout, select.POLLIN)
    if not poll.poll(START_SECONDS * 1000):
        worker.process.kill()
        raise WorkerError(f"a draft worker did not start within {START_SECONDS:g} s")
    line = worker.process.stdout.readline()
    if line:
        address: str = json.loads(line)["address"]
        return address
    worker.process.wait()
    raise WorkerError(f"a draft worker {worker.end}")


def _last_words(worker: _Worker) -> list[dict[str, Any]]:
    """The statistics that a worker prints when it ends."""
    assert worker.process.stdout is not None
    if worker.process.stdout.closed:  # by a restart that then failed
        return []
    lines = [json.loads(line) for line in worker.process.stdout.read().splitlines()]
    return [line["statistics"] for line in lines if "statistics" in line]


def _finish(worker: _Worker) -> None:
    worker.process.wait()
    if worker.listener is not None:
        worker.listener.join()
    for pipe in (worker.process.stdin, worker.process.stdout, worker.process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
