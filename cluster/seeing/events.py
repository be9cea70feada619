"""What a target engine and its drafters did, noted while it happens and made sense of later.

An event holds references to what the engine made anyway; nothing is formatted before a sink asks.
Seconds are of the engine's clock, but for those within a draft worker's messages.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from outrider.actors.request_run import RequestRun
from outrider.actors.target_engine import Part
from outrider.actors.tracing import Span
from outrider.actors.transport import DraftChannel, Received
from outrider.speculation.replication.messages import TargetMessage
from outrider.speculation.request import Request, StepOutput
from outrider.speculation.tree import DraftTree
from outrider.speculation.types import IntArray, Verdict

CHUNK = 4096
"""Events that are noted before a sink gets them, between two of the engine's doings."""


class Drafted(NamedTuple):
    """A draft step in the target's process; ``rows`` for each of the requests."""

    span: Span
    requests: list[Request]
    rows: Sequence[int]


class TookGrowth(NamedTuple):
    """The target placed what had arrived from draft workers."""

    span: Span


class Waited(NamedTuple):
    """The target was held back for these requests' drafters."""

    span: Span
    requests: list[Request]


class Judged(NamedTuple):
    """One request's part of a target step.

    position: tokens of its text before the step. rows: its share of the forward's.
    tree, tokens, verdict: what was verified, the target's own tokens after the root and each
        node (int64 ``[nodes + 1]``), and the path accepted; None where the step only cached text.
    """

    request: Request
    position: int
    rows: int
    tree: DraftTree | None
    tokens: IntArray | None
    verdict: Verdict | None
    output: StepOutput | None


class Stepped(NamedTuple):
    """A target step and the forward in it."""

    span: Span
    forward: Span
    parts: list[Judged]


class Opened(NamedTuple):
    """Messages of this session are about this request from now on."""

    session: int
    request_id: str


class Sent(NamedTuple):
    """A message to the draft worker at ``address``."""

    at: float
    address: str
    message: TargetMessage


class Arrived(NamedTuple):
    """What was taken from a draft worker's stream, which may have lain there for a while."""

    at: float
    address: str
    received: list[Received]


Event: TypeAlias = Drafted | TookGrowth | Waited | Stepped | Opened | Sent | Arrived
Sink: TypeAlias = Callable[[list[Event]], None]


class EventLog:
    """A ``Trace`` that hands all events to ``sink``, in order, ``CHUNK`` of them at a time.

    clock: the engine's.
    """

    def __init__(self, sink: Sink, clock: Callable[[], float] = time.perf_counter) -> None:
        self._sink, self._clock = sink, clock
        self._events: list[Event] = []
        self._tokens: Sequence[IntArray] = ()

    def flush(self) -> None:
        """Hands over what there is; on the engine's thread."""
        events, self._events = self._events, []
        self._sink(events)

    def drafted(self, span: Span, runs: Sequence[RequestRun], rows: Sequence[int]) -> None:
        """See ``Trace``."""
        self._note(Drafted(span, [run.request for run in runs], rows))

    def took_growth(self, span: Span) -> None:
        """See ``Trace``."""
        self._note(TookGrowth(span))

    def waited(self, span: Span, runs: Sequence[RequestRun]) -> None:
        """See ``Trace``."""
        self._note(Waited(span, [run.request for run in runs]))

    def judged(self, tokens: Sequence[IntArray]) -> None:
        """See ``Trace``."""
        self._tokens = tokens

    def stepped(
        self,
        span: Span,
        forward: Span,
        parts: Sequence[Part],
        verdicts: Sequence[Verdict | None],
        outputs: Sequence[StepOutput | None],
    ) -> None:
        """See ``Trace``."""
        tokens = iter(self._tokens)
        self._note(
            Stepped(
                span,
                forward,
                [
                    _judged(part, None if part.tree is None else next(tokens), verdict, output)
                    for part, verdict, output in zip(parts, verdicts, outputs, strict=True)
                ],
            )
        )
        self._tokens = ()

    def opened(self, session: int, request_id: str) -> None:
        """See ``Trace``."""
        self._note(Opened(session, request_id))

    def watch(self, channel: DraftChannel) -> "WatchedChannel":
        """See ``Trace``."""
        return WatchedChannel(channel, self._note, self._clock)

    def _note(self, event: Event) -> None:
        self._events.append(event)
        if len(self._events) >= CHUNK:
            self.flush()


class WatchedChannel:
    """A ``DraftChannel`` whose messages are noted."""

    def __init__(
        self, channel: DraftChannel, note: Callable[[Event], None], clock: Callable[[], float]
    ) -> None:
        self.address = channel.address
        self._channel, self._note, self._clock = channel, note, clock

    def send(self, message: TargetMessage) -> int:
        """See ``DraftChannel``."""
        self._note(Sent(self._clock(), self.address, message))
        return self._channel.send(message)

    def receive(self) -> list[Received]:
        """See ``DraftChannel``."""
        received = self._channel.receive()
        if received:
            self._note(Arrived(self._clock(), self.address, received))
        return received

    def close(self) -> None:
        """See ``DraftChannel``."""
        self._channel.close()


def _judged(
    part: Part, tokens: IntArray | None, verdict: Verdict | None, output: StepOutput | None
) -> Judged:
    run = part.run
    committed = 0 if output is None else len(output.token_ids)
    return Judged(
        request=run.request,
        position=len(run.committed) - committed,
        rows=part.num_rows,
        tree=part.tree,
        tokens=tokens,
        verdict=verdict,
        output=output,
    )
