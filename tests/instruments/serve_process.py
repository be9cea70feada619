"""``outrider serve`` in a process of its own."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 600.0
"""Far more than a small model takes to load, also on a busy machine."""
_ANNOUNCED = re.compile(r"is served at (http://\S+)")


class ServeProcess:
    """A server. lines: of its standard error so far. url: once it has announced itself."""

    url: str

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process, self.lines = process, list[str]()
        self._ready: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_ready(self) -> None:
        """Until it is announced."""
        url = self._ready.get(timeout=SECONDS)
        assert url is not None, "".join(self.lines)
        self.url = url

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal, and does not wait for what comes of it."""
        self.process.send_signal(number)

    def exit_code(self) -> int:
        """Once it has ended."""
        code = self.process.wait(SECONDS)
        self._reader.join(SECONDS)
        return code

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.lines.append(line)
                if found := _ANNOUNCED.search(line):
                    self._ready.put(found[1])
        self._ready.put(None)


@contextmanager
def serve_process(*words: str) -> Iterator[ServeProcess]:
    """With these flags, on a free port unless one is among them; killed at the end if it still runs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OUTRIDER_"))}
    port = () if "--port" in words else ("--port", "0")
    process = subprocess.Popen(
        [sys.executable, "-m", "outrider.cluster.cli.main", "serve", *words, *port],
        stderr=subprocess.PIPE,
        text=True,
        env={**kept, "PYTHONUNBUFFERED": "1"},
    )
    served = ServeProcess(process)
    try:
        served.wait_ready()
        yield served
    finally:
        process.kill()
        served.exit_code()
