"""A process that was started here: its first words, its complaints and its end."""

import contextlib
import os
import select
import signal
import subprocess
import threading
from dataclasses import dataclass, field

from outrider.speculation.errors import WorkerError

START_SECONDS = 120.0
"""For a process to import what it needs, and a draft worker to load its model."""
MAX_COMPLAINT_LINES = 20


@dataclass(slots=True)
class Child:
    """One process, all three of whose streams are pipes.

    complaints: the last lines of its standard error, which ``listener`` reads.
    """

    process: subprocess.Popen[str]
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

    def first_line(self, name: str) -> str:
        """What it says first; ``name`` stands for it in errors.

        Raises:
            WorkerError: it says nothing in time, or ends; the message holds its last complaint.
        """
        assert self.process.stdout is not None
        # Without a thread that could outlive a Ctrl-C; it is one line, written at once.
        # Unlike select(), poll() knows descriptors beyond 1023.
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        if not poll.poll(START_SECONDS * 1000):
            self.process.kill()
            raise WorkerError(f"{name} did not start within {START_SECONDS:g} s")
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise WorkerError(f"{name} {self.end}")
        return line

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

    def finish(self) -> None:
        """Waits for its end and closes the pipes."""
        self.process.wait()
        if self.listener is not None:
            self.listener.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def stop_at_end_of_input() -> None:
    """In a child: ends this process as SIGTERM does when its parent closes the pipe, or is gone."""
    # Not through sys.stdin: a thread that waits in there makes the interpreter abort when it exits.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
