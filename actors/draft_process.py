"""A draft worker as a process: the network's loop on one thread, drafting on the other."""

import threading
import time
from collections import deque
from collections.abc import Callable

from outrider.actors.draft_worker import DraftWorker
from outrider.actors.grpc_server import DraftServer, Peer
from outrider.actors.io_thread import IoThread
from outrider.actors.security import Security
from outrider.speculation.replication.messages import Hello, TargetMessage, Welcome
from outrider.speculation.statistics import WorkerStatistics

GRACE_SECONDS = 0.2
MAX_WAITING = 1 << 16
"""Messages that may wait for the end of a draft step; what comes beyond that is not heard.

A commit that is missing shows in the next one's sequence number, an ``Open`` in its commits, and a
session whose ``Close`` was missed is forgotten after a while.
"""


class DraftProcess:
    """Serves targets with one worker. Everything that the worker sees happens on ``run``'s thread.

    port: 0 takes a free one; ``address`` tells which. at_end: called when ``run`` has ended.

    Raises:
        InvalidConfigError: see ``DraftServer``.
    """

    def __init__(
        self,
        worker: DraftWorker,
        welcome: Welcome,
        *,
        host: str,
        port: int,
        security: Security,
        at_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._worker, self._at_end = worker, at_end
        self.on_sessions: Callable[[int], None] = lambda _: None
        """Told, on ``run``'s thread, how many sessions there are whenever that has changed."""
        self._told = 0
        self.model = welcome.model
        """The draft model's name."""
        self._events: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        # Before the thread: what it refuses would leave one behind.
        self._server = DraftServer(welcome, self, host=host, port=port, security=security)
        self._io = IoThread()
        try:
            self._io.run(self._server.start())
        except BaseException:
            self._io.close()
            raise
        self.address = f"{f'[{host}]' if ':' in host else host}:{self._server.port}"

    def run(self) -> WorkerStatistics:
        """Drafts until ``stop``; commits are heeded between two steps."""
        try:
            while not self._stopped:
                self._take_in()
                if not self._worker.step():
                    self._wait()
        finally:
            self._io.run(self._server.stop(GRACE_SECONDS))
            self._io.close()
            self._at_end()
        self._worker.statistics.ended_at = time.perf_counter()
        return self._worker.statistics

    def stop(self) -> None:
        """Makes ``run`` return after the step at hand; safe in a signal handler."""
        self._stopped = True
        # A handler may have interrupted the very thread that holds the lock.
        threading.Thread(target=self._notify, daemon=True).start()

    def joined(self, peer: Peer, hello: Hello) -> None:
        """See ``PeerEvents``."""
        self._put(lambda: self._worker.joined(peer, hello))

    def message(self, peer: Peer, message: TargetMessage, num_bytes: int) -> None:  # noqa: ARG002
        """See ``PeerEvents``."""
        if len(self._events) < MAX_WAITING:
            self._put(lambda: self._worker.message(peer, message))

    def left(self, peer: Peer) -> None:
        """See ``PeerEvents``."""
        self._put(lambda: self._worker.left(peer))

    def _put(self, event: Callable[[], None]) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify()

    def _take_in(self) -> None:
        while self._events:
            self._events.popleft()()
        if self._worker.num_sessions != self._told:
            self._told = self._worker.num_sessions
            self.on_sessions(self._told)

    def _wait(self) -> None:
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._stopped)
        self._worker.slept(time.perf_counter() - began)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify()
