"""A network, draft workers and a clock in simulated time, for the simulator and for tests.

The real state machines run on it unchanged. The target is the one who drives: while its
forward takes its time, or while it waits, everything else happens in the order of the clock.
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import Generic, Protocol, TypeVar

from outrider.actors import wire
from outrider.actors.draft_worker import DraftWorker
from outrider.actors.transport import Disconnected, Received
from outrider.speculation.replication.messages import DrafterMessage, Hello, TargetMessage, Welcome

AnyMessage = TypeVar("AnyMessage", bound=TargetMessage | DrafterMessage)

Faults = Callable[[int, TargetMessage | DrafterMessage], Sequence[float]]
"""What becomes of the n-th message of a link: extra delays of its copies; none: it is lost."""


def faultless(index: int, message: TargetMessage | DrafterMessage) -> Sequence[float]:  # noqa: ARG001
    """Everything arrives, once."""
    return (0.0,)


class VirtualClock:
    """Simulated seconds, and what happens when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Has ``action`` happen so much later; of equal times, first come first served."""
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), action))

    def advance(self, seconds: float) -> None:
        """Lets time pass, and all that happens in it."""
        self.run_until(lambda: False, seconds)

    def run_until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Lets time pass until something holds, at most so long."""
        deadline = self.now + seconds
        while not condition() and self._events and self._events[0][0] <= deadline:
            self.now, _, action = heapq.heappop(self._events)
            action()
        if not condition():
            self.now = deadline


class BusyTime:
    """A draft engine's clock: within a step it runs ahead of the world by what the step took."""

    def __init__(self, world: VirtualClock) -> None:
        self._world = world
        self.spent = 0.0

    def __call__(self) -> float:
        return self._world.now + self.spent

    def spend(self, seconds: float) -> None:
        """The step takes so much longer."""
        self.spent += seconds


class _Wire(Generic[AnyMessage]):
    """One direction of a link. Every message is encoded and decoded, as on a real wire."""

    def __init__(
        self,
        clock: VirtualClock,
        delay: float,
        faults: Faults,
        encode: Callable[[AnyMessage], bytes],
        decode: Callable[[bytes], AnyMessage],
        deliver: Callable[[AnyMessage, int], None],
    ) -> None:
        self._clock, self._delay, self._faults = clock, delay, faults
        self._encode, self._decode, self._deliver = encode, decode, deliver
        self._sent = 0

    def send(self, message: AnyMessage) -> int:
        data = self._encode(message)
        for extra in self._faults(self._sent, message):
            self._clock.after(self._delay + extra, lambda: self._deliver(self._decode(data), len(data)))
        self._sent += 1
        return len(data)


class VirtualLink:
    """A ``DraftChannel`` to a worker in the same simulation, and the worker's peer.

    delay: one-way seconds. to_worker, to_target: faults of either direction, which ``Hello``
    and ``Welcome`` do not suffer.
    """

    def __init__(
        self,
        clock: VirtualClock,
        worker: "VirtualWorker",
        *,
        hello: Hello,
        welcome: Welcome,
        delay: float = 0.0,
        to_worker: Faults = faultless,
        to_target: Faults = faultless,
    ) -> None:
        self.address = welcome.name
        self._clock, self._worker = clock, worker
        self._hello, self._welcome = hello, welcome
        self._delay, self._faults = delay, (to_worker, to_target)
        self._inbox: deque[Received] = deque()
        self._connected = False
        self.connect()

    @property
    def has_arrivals(self) -> bool:
        """Whether something waits to be received."""
        return bool(self._inbox)

    def connect(self) -> None:
        """Begins a stream: its handshake takes a round trip."""
        self._connected = True
        self._peer = _Peer(self, self._worker)
        down, up = self._faults
        peer, clock = self._peer, self._clock
        self._down = _Wire(
            clock, self._delay, down, wire.encode_target, wire.decode_target,
            lambda message, _: self._worker.receive(peer, message) if peer.link is self else None,
        )  # fmt: skip
        self._up = _Wire(
            clock, self._delay, up, wire.encode_drafter, wire.decode_drafter,
            lambda message, size: self._arrive(peer, Received(message, size, clock.now)),
        )  # fmt: skip
        clock.after(self._delay, lambda: self._worker.join(peer, self._hello))
        clock.after(2 * self._delay, lambda: self._arrive(peer, Received(self._welcome, 0)))

    def disconnect(self, reason: str) -> None:
        """Ends the stream, with all that is on its way."""
        if self._connected:
            self._connected = False
            self._peer.link = None
            self._worker.leave(self._peer)
            self._inbox.append(Received(Disconnected(reason), 0))

    def send(self, message: TargetMessage) -> int:
        """See ``DraftChannel.send``."""
        return self._down.send(message) if self._connected else 0

    def receive(self) -> list[Received]:
        """See ``DraftChannel.receive``."""
        arrived = list(self._inbox)
        self._inbox.clear()
        return arrived

    def close(self) -> None:
        """See ``DraftChannel.close``."""
        self.disconnect("closed")

    def send_up(self, peer: "_Peer", message: DrafterMessage) -> None:
        """What the worker sends; a peer of an earlier stream reaches nobody."""
        if peer is self._peer and self._connected:
            self._up.send(message)

    def _arrive(self, peer: "_Peer", received: Received) -> None:
        if peer is self._peer and self._connected:
            self._inbox.append(received)


class _Peer:
    """The worker's end of one stream."""

    def __init__(self, link: VirtualLink, worker: "VirtualWorker") -> None:
        self.link: VirtualLink | None = link
        """None once the stream has ended."""
        self._worker = worker

    def send(self, message: DrafterMessage) -> None:
        """Leaves the worker when its step ends."""
        self._worker.post(self, message)


class VirtualWorker:
    """A ``DraftWorker`` that takes its time: what a step yields leaves when the step ends.

    busy: the clock that the worker's engine spends its time on.
    """

    def __init__(self, clock: VirtualClock, worker: DraftWorker, busy: BusyTime) -> None:
        self._clock, self.worker, self._busy = clock, worker, busy
        self._inbox: deque[Callable[[], None]] = deque()
        self._outbox: list[tuple[_Peer, DrafterMessage]] = []
        self._working = False
        self.stopped = False
        """Set it to hang the worker, as SIGSTOP does; ``wake`` goes on."""

    def join(self, peer: _Peer, hello: Hello) -> None:
        """A target has connected."""
        self._take(lambda: self.worker.joined(peer, hello))

    def leave(self, peer: _Peer) -> None:
        """A target has gone."""
        self._take(lambda: self.worker.left(peer))

    def receive(self, peer: _Peer, message: TargetMessage) -> None:
        """Something has arrived; it is looked at between steps."""
        self._take(lambda: self.worker.message(peer, message))

    def post(self, peer: _Peer, message: DrafterMessage) -> None:
        """Takes what the worker sends."""
        self._outbox.append((peer, message))

    def wake(self) -> None:
        """Goes on if there is something to do."""
        if self._working or self.stopped:
            return
        self._busy.spent = 0.0
        while self._inbox:
            self._inbox.popleft()()
        went_on = self.worker.step()
        posted, self._outbox = self._outbox, []
        spent, self._busy.spent = self._busy.spent, 0.0
        self._working = True
        self._clock.after(spent, lambda: self._finish(posted, went_on))

    def _take(self, event: Callable[[], None]) -> None:
        self._inbox.append(event)
        self.wake()

    def _finish(self, posted: list[tuple[_Peer, DrafterMessage]], went_on: bool) -> None:
        self._working = False
        for peer, message in posted:
            if peer.link is not None:
                peer.link.send_up(peer, message)
        if went_on or self._inbox:
            self.wake()


class Inbox(Protocol):
    """A channel that says whether something waits to be received."""

    @property
    def has_arrivals(self) -> bool: ...


class VirtualArrivals:
    """``Arrivals`` of virtual links: waiting lets the world go on."""

    def __init__(self, clock: VirtualClock, links: Sequence[Inbox]) -> None:
        self._clock, self._links = clock, links

    def wait(self, seconds: float) -> None:
        """See ``Arrivals.wait``."""
        self._clock.run_until(lambda: any(link.has_arrivals for link in self._links), seconds)
