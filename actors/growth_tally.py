"""What the growth that arrived for one session comes to, summed up once per step.

There may be hundreds of messages between two steps of the target, so a native kernel does the
same where it was built.
"""

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from outrider.actors.transport import Received
from outrider.kernels.native import library
from outrider.speculation.replication.messages import Growth

if TYPE_CHECKING:
    from outrider.kernels.native._replication import Tallier

NO_GENERATION = -1


class Tally(NamedTuple):
    """Growth of one generation, in order, and its sums; the names are those of ``Growth``.

    messages: the growth itself. nodes, num_bytes: of all of it; bytes on the wire.
    seen_commit: the last one that any of it has seen. sent_at: of the latest, on the drafter's clock.
    round_steps, round_seconds: of what has seen the last commit of all; round_ended: whether the
        last of that is ``final``.
    stale_messages, stale_nodes: of other generations, which are in nothing else.
    """

    messages: list[Growth]
    nodes: int
    num_bytes: int
    draft_steps: int
    draft_rows: int
    draft_seconds: float
    seen_commit: int
    sent_at: float
    round_steps: int
    round_seconds: float
    round_ended: bool
    stale_messages: int
    stale_nodes: int


def by_session(arrived: list[Received], start: int) -> tuple[dict[int, list[Received]], int]:
    """Growth from index ``start`` on, in order, up to the first event that is none; and its index."""
    native = _native()
    return by_session_reference(arrived, start) if native is None else native.by_session(arrived, start)


def by_session_reference(arrived: list[Received], start: int) -> tuple[dict[int, list[Received]], int]:
    """``by_session`` in plain Python."""
    grown: dict[int, list[Received]] = {}
    for index in range(start, len(arrived)):
        event = arrived[index].event
        if not isinstance(event, Growth):
            return grown, index
        grown.setdefault(event.session, []).append(arrived[index])
    return grown, len(arrived)


def tally(arrived: list[Received], generation: int, sequence: int) -> Tally:
    """Sums up growth; ``arrived`` holds nothing else.

    generation: the present one, or ``NO_GENERATION``. sequence: of its last commit.
    """
    native = _native()
    if native is None:
        return tally_reference(arrived, generation, sequence)
    return Tally._make(native.tally(arrived, generation, sequence))


def tally_reference(arrived: list[Received], generation: int, sequence: int) -> Tally:
    """``tally`` in plain Python."""
    growths = [(each.event, each.num_bytes) for each in arrived if isinstance(each.event, Growth)]
    messages = [growth for growth, _ in growths if growth.generation == generation]
    current = [growth for growth in messages if growth.seen_commit == sequence]
    stale = [growth for growth, _ in growths if growth.generation != generation]
    return Tally(
        messages=messages,
        nodes=sum(len(growth.tokens) for growth in messages),
        num_bytes=sum(size for growth, size in growths if growth.generation == generation),
        draft_steps=sum(growth.draft_steps for growth in messages),
        draft_rows=sum(growth.draft_rows for growth in messages),
        draft_seconds=sum((growth.draft_seconds for growth in messages), 0.0),
        seen_commit=max((growth.seen_commit for growth in messages), default=0),
        sent_at=max((growth.sent_at for growth in messages), default=float("-inf")),
        round_steps=sum(growth.draft_steps for growth in current),
        round_seconds=sum((growth.draft_seconds for growth in current), 0.0),
        round_ended=bool(current) and current[-1].final,
        stale_messages=len(stale),
        stale_nodes=sum(len(growth.tokens) for growth in stale),
    )


def seconds_between(messages: list[Growth], began: float, ended: float) -> float:
    """Seconds of drafting that were reported from ``began`` to ``ended``, on the drafter's clock."""
    native = _native()
    if native is None:
        return seconds_between_reference(messages, began, ended)
    return native.seconds_between(messages, began, ended)


def seconds_between_reference(messages: list[Growth], began: float, ended: float) -> float:
    """``seconds_between`` in plain Python."""
    return sum((each.draft_seconds for each in messages if began <= each.sent_at <= ended), 0.0)


@cache
def _native() -> "Tallier | None":
    return library.tallier(Received, Growth)
