"""What target and draft worker need of a transport; gRPC and the simulator both provide it."""

from dataclasses import dataclass
from typing import Protocol

from outrider.speculation.replication.messages import DrafterMessage, TargetMessage


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The stream is gone, with all that was on its way; a ``Welcome`` follows if it comes back.

    lasting: the worker refuses this target, which only people can mend.
    """

    reason: str
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class Overflowed:
    """Messages came faster than they were taken, and some were thrown away."""


@dataclass(frozen=True, slots=True)
class Received:
    """What arrived, and how many bytes it took on the wire (0 for events of the transport itself).

    arrived_at: on the target's clock; None: when it is taken.
    """

    event: DrafterMessage | Disconnected | Overflowed
    num_bytes: int
    arrived_at: float | None = None


class DraftChannel(Protocol):
    """The target's end of the stream to one draft worker.

    It connects and reconnects by itself; each connection begins with a ``Welcome`` event.
    """

    address: str
    """For messages to people."""

    def send(self, message: TargetMessage) -> int:
        """Sends without waiting; returns the bytes sent, 0 while there is no connection."""
        ...

    def receive(self) -> list[Received]:
        """All that arrived since the last call, in order; never waits."""
        ...

    def close(self) -> None:
        """Ends the stream for good."""
        ...


class Arrivals(Protocol):
    """Wakes a target that waits for its draft workers."""

    def wait(self, seconds: float) -> None:
        """Returns when something has arrived on any channel and was not received yet, or time is up."""
        ...


class TargetPeer(Protocol):
    """A draft worker's end of the stream from one target."""

    def send(self, message: DrafterMessage) -> None:
        """Sends without waiting; a peer that has gone, or reads too slowly, loses its stream."""
        ...
