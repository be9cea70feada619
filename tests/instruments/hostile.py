"""A draft worker of which nothing can be relied on, as the target's transport would show it."""

from instruments.remote import welcome_of
from outrider.actors import wire
from outrider.actors.transport import Disconnected, Received
from outrider.actors.virtual import VirtualClock
from outrider.speculation.errors import WireError
from outrider.speculation.replication.messages import DrafterMessage, Open, TargetMessage

PAUSE = 0.02
"""Seconds until a stream that broke the protocol is back."""
MAX_WAITING = 4096


class HostileChannel:
    """A ``DraftChannel`` that brings whatever is said: encoded, and decoded like the real one.

    What cannot be decoded ends the stream, which then comes back. opened: the newest ``Open``.
    """

    address = "hostile"

    def __init__(self, world: VirtualClock, vocab_size: int) -> None:
        self._world, self._vocab_size = world, vocab_size
        self._inbox: list[Received] = []
        self._connected = False
        self.opened: Open | None = None
        self.breaches = 0
        self._connect()

    def say(self, what: DrafterMessage | bytes) -> None:
        """Something arrives at the target, if there is a stream and room."""
        if not self._connected or len(self._inbox) >= MAX_WAITING:
            return
        data = what if isinstance(what, bytes) else wire.encode_drafter(what)
        try:
            self._inbox.append(Received(wire.decode_drafter(data), len(data)))
        except WireError as error:
            self.breaches += 1
            self.hang_up(str(error))

    def hang_up(self, reason: str) -> None:
        """Ends the stream, with all that nobody took; it comes back after a while."""
        if self._connected:
            self._connected = False
            self._inbox = [Received(Disconnected(reason), 0)]
            self._world.after(PAUSE, self._connect)

    @property
    def has_arrivals(self) -> bool:
        """Whether something waits to be received."""
        return bool(self._inbox)

    def send(self, message: TargetMessage) -> int:
        """See ``DraftChannel.send``."""
        if not self._connected:
            return 0
        data = wire.encode_target(message)
        if isinstance(message, Open):
            self.opened = message
        return len(data)

    def receive(self) -> list[Received]:
        """See ``DraftChannel.receive``."""
        arrived, self._inbox = self._inbox, []
        return arrived

    def wait(self, seconds: float) -> None:
        """See ``Arrivals.wait``: the only worker's channel is also the target's bell."""
        self._world.run_until(lambda: self.has_arrivals, seconds)

    def close(self) -> None:
        """See ``DraftChannel.close``."""
        self._connected = False

    def _connect(self) -> None:
        self._connected = True
        self._inbox.append(Received(welcome_of("hostile", self._vocab_size), 0))
