"""What draft workers did and when, put together from the messages that passed.

A worker's own clock is all that says when it drafted. As in ``DraftPool`` it is related to the
target's by the message that was taken in soonest after it was sent: no block lies earlier than it
was, and all of a connection lie later by what that message took.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from outrider.actors.transport import Received
from outrider.cluster.seeing.events import Arrived, Event, Opened, Sent
from outrider.speculation.replication.messages import ROOT_ID, Close, Commit, Growth, Open, Welcome


@dataclass(slots=True, eq=False)
class Grown:
    """A growth message. arrived: when the target took it in. late: which of its nodes were stale.

    connection: number of the stream at this address; clocks are related within one.
    began, ended: of its draft steps on the target's clock, once all is known.
    """

    request_id: str
    address: str
    connection: int
    growth: Growth
    arrived: float
    late: list[bool]
    began: float = 0.0
    ended: float = 0.0


@dataclass(frozen=True, slots=True)
class Committed:
    """A commit that was sent, and the first growth that had seen it."""

    at: float
    heeded: Grown


@dataclass(slots=True)
class _Generation:
    """One attempt at keeping two trees alike: the target's text, and where nodes hang.

    positions: of nodes that are part of the text, by id. dead: nodes beside the text.
    """

    text: list[int]
    commits: list[Sent] = field(default_factory=list)
    nodes: dict[int, tuple[int, int]] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)
    dead: set[int] = field(default_factory=set)
    heeded: int = 0

    def add(self, growth: Growth) -> list[bool]:
        """Places a message's nodes; which of them are stale."""
        late = []
        for offset, (parent, token) in enumerate(
            zip(growth.parents.tolist(), growth.tokens.tolist(), strict=True)
        ):
            node = growth.first_id + offset
            # Nodes below the root are kept apart by the position at which they stand.
            self.nodes[node] = (-growth.base_length if parent == ROOT_ID else parent, token)
            late.append(self._is_dead(node))
        return late

    def _is_dead(self, node: int) -> bool:
        """Whether a node, or one above it, is not the token that stands at its position by now."""
        path = []
        above = node
        while above in self.nodes and above not in self.positions and above not in self.dead:
            path.append(above)
            above = self.nodes[above][0]
        if above > 0 and above not in self.positions:
            self.dead.update(path)
            return True
        position = -above if above <= 0 else self.positions[above] + 1
        while path and position < len(self.text):
            if self.nodes[path[-1]][1] != self.text[position]:
                self.dead.update(path)
                return True
            self.positions[path.pop()] = position
            position += 1
        return False


class Drafters:
    """Is fed all events in order.

    names: of workers, by address.
    """

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.grown: list[Grown] = []
        self.commits: list[Committed] = []
        self._requests: dict[int, str] = {}
        self._generations: dict[tuple[str, int, int], _Generation] = {}
        self._connections: dict[str, int] = {}

    def feed(self, events: Iterable[Event]) -> None:
        """Takes in what happened next."""
        for event in events:
            if isinstance(event, Opened):
                self._requests[event.session] = event.request_id
            elif isinstance(event, Sent):
                self._send(event)
            elif isinstance(event, Arrived):
                for received in event.received:
                    self._receive(event, received)

    def forget(self, close: Sent) -> None:
        """A session was closed: nothing that still arrives for it is of interest."""
        assert isinstance(close.message, Close)
        self._generations.pop((close.address, close.message.session, close.message.generation), None)

    def settle(self) -> None:
        """Relates the clocks: says when every draft step was. Call it when all has been fed."""
        by_address = sorted(self.grown, key=lambda each: (each.address, each.connection))
        for _, group in groupby(by_address, key=lambda each: (each.address, each.connection)):
            _place(list(group))

    def _send(self, event: Sent) -> None:
        message = event.message
        if isinstance(message, Open):
            key = event.address, message.session, message.generation
            self._generations[key] = _Generation(message.token_ids.tolist())
        elif isinstance(message, Commit):
            generation = self._generations.get((event.address, message.session, message.generation))
            if generation is not None:
                generation.text += message.tokens.tolist()
                generation.commits.append(event)

    def _receive(self, event: Arrived, received: Received) -> None:
        message, address = received.event, event.address
        if isinstance(message, Welcome):
            self.names[address] = message.name
            self._connections[address] = self._connections.get(address, 0) + 1
        elif isinstance(message, Growth):
            generation = self._generations.get((address, message.session, message.generation))
            if generation is None:
                return
            grown = Grown(
                request_id=self._requests.get(message.session, ""),
                address=address,
                connection=self._connections.get(address, 0),
                growth=message,
                arrived=event.at,
                late=generation.add(message),
            )
            self.grown.append(grown)
            self.commits += self._heeded(generation, grown)

    def _heeded(self, generation: _Generation, grown: Grown) -> Iterator[Committed]:
        """Commits that this message is the first to have seen; the last of them is why it was sent."""
        seen = min(grown.growth.seen_commit, len(generation.commits))
        for sent in generation.commits[generation.heeded : seen]:
            yield Committed(sent.at, grown)
        generation.heeded = max(generation.heeded, seen)


def _place(grown: list[Grown]) -> None:
    """Lays one connection's draft steps out on the target's clock, where none overlap.

    A step that several requests shared is told as a share for each, sent right behind one another:
    laid side by side they are the step.
    """
    offset = min(each.arrived - each.growth.sent_at for each in grown)
    next_began = float("inf")
    for each in sorted(grown, key=lambda each: each.growth.sent_at, reverse=True):
        each.ended = min(each.growth.sent_at + offset, next_began)
        each.began = next_began = each.ended - each.growth.draft_seconds
