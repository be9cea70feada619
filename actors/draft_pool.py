"""The draft workers of one target engine: who drafts for whom, and what arrives from them.

Plain Python; channels and clock are passed in. A worker that fails, hangs or talks nonsense
costs its requests their growth and nothing else: they are opened at another worker, or
decoded plainly until one is back.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from outrider.actors.growth_tally import by_session, seconds_between
from outrider.actors.remote_session import RemoteSession
from outrider.actors.transport import Arrivals, Disconnected, DraftChannel, Overflowed, Received
from outrider.speculation.replication.messages import DrafterMessage, GrowthLimits, Lost, Welcome
from outrider.speculation.request import Request
from outrider.speculation.statistics import SpeculationStatistics

log = logging.getLogger(__name__)

REPLICA_CAPACITY = 512
"""Nodes of a request's tree at the target."""
AVOIDED_SECONDS = 5.0


@dataclass(slots=True, eq=False)
class _Link:
    """One worker. clock_offset: its clock against ours, at most the fastest message too much.

    avoid_until: others are preferred, for it has failed a request lately.
    failure: why it is out of reach, for people. refused: waiting for it would not help.
    """

    channel: DraftChannel
    welcome: Welcome | None = None
    sessions: dict[int, RemoteSession] = field(default_factory=dict)
    clock_offset: float = float("inf")
    avoid_until: float = 0.0
    failure: str = ""
    refused: bool = False

    @property
    def has_room(self) -> bool:
        return self.welcome is not None and len(self.sessions) < self.welcome.max_sessions


class DraftPool:
    """Opens requests at draft workers and keeps their trees fed.

    limits: of a request's growth; ``steps`` those after the prompt. clock: monotonic seconds.
    """

    def __init__(
        self,
        channels: Sequence[DraftChannel],
        arrivals: Arrivals,
        *,
        limits: Callable[[Request], GrowthLimits],
        vocab_size: int,
        clock: Callable[[], float],
    ) -> None:
        self._links = [_Link(channel) for channel in channels]
        self._arrivals, self._limits = arrivals, limits
        self._vocab_size, self._clock = vocab_size, clock
        self._last_number = 0
        self._homeless: list[RemoteSession] = []

    @property
    def num_connected(self) -> int:
        """Workers in reach."""
        return sum(link.welcome is not None for link in self._links)

    @property
    def failures(self) -> dict[str, str]:
        """Why workers are out of reach now, for people, by their addresses."""
        return {link.channel.address: link.failure for link in self._links if link.failure}

    @property
    def num_sessions(self) -> int:
        """Requests that a worker drafts for."""
        return sum(len(link.sessions) for link in self._links)

    def open(self, request: Request, stats: SpeculationStatistics) -> RemoteSession:
        """A session for a request; without a worker in reach it waits for one."""
        self._last_number += 1
        session = RemoteSession(
            self._last_number,
            request,
            limits=self._limits(request),
            vocab_size=self._vocab_size,
            capacity=REPLICA_CAPACITY,
            stats=stats,
            clock=self._clock,
        )
        self._homeless.append(session)
        self._place_homeless()
        return session

    @property
    def addresses(self) -> list[str]:
        """Of the workers that drafting was asked of, in reach or not."""
        return [link.channel.address for link in self._links]

    def add(self, channel: DraftChannel) -> None:
        """One more worker, which need not be there yet."""
        self._links.append(_Link(channel))

    def remove(self, address: str) -> None:
        """Lets go of a worker; its requests are opened elsewhere."""
        for link in [each for each in self._links if each.channel.address == address]:
            for session in link.sessions.values():
                session.detach()
            self._homeless += [each for each in link.sessions.values() if not each.closed]
            link.channel.close()
            self._links.remove(link)

    def poll(self, busy: tuple[float, float] = (0.0, 0.0)) -> None:
        """Takes in all that has arrived; never waits.

        busy: when the target's last step began and ended; drafting meanwhile was hidden.
        """
        now = self._clock()
        for link in self._links:
            self._receive(link, now, busy)
        for link in self._links:
            for session in link.sessions.values():
                session.absorb()
        for link in self._links:
            self._sort_out(link, now)
        if self._homeless:
            self._place_homeless()

    def wait(self, seconds: float) -> None:
        """Until something arrives, or time is up."""
        self._arrivals.wait(seconds)

    def wait_for_workers(self, seconds: float) -> int:
        """Until every worker is in reach or refuses, or time is up; returns how many are in reach."""
        deadline = self._clock() + seconds
        while self._is_awaited and (left := deadline - self._clock()) > 0:
            self._arrivals.wait(left)
            self.poll()
        return self.num_connected

    def close(self) -> None:
        """Ends all streams; requests go on plainly."""
        for link in self._links:
            for session in link.sessions.values():
                session.detach()
            link.channel.close()
            link.welcome = None

    @property
    def _is_awaited(self) -> bool:
        return any(link.welcome is None and not link.refused for link in self._links)

    def _receive(self, link: _Link, now: float, busy: tuple[float, float]) -> None:
        arrived, at = link.channel.receive(), 0
        while at < len(arrived):
            grown, at = by_session(arrived, at)
            self._hand_out(link, grown, now, busy)
            if at < len(arrived):
                self._heed(link, arrived[at].event)
                at += 1

    def _hand_out(
        self, link: _Link, grown: dict[int, list[Received]], now: float, busy: tuple[float, float]
    ) -> None:
        for number, arrived in grown.items():
            session = link.sessions.get(number)
            if session is None:
                continue
            received = session.receive(arrived)
            link.clock_offset = min(link.clock_offset, now - received.sent_at)
            began, ended = busy[0] - link.clock_offset, busy[1] - link.clock_offset
            session.stats.overlapped_draft_seconds += seconds_between(received.messages, began, ended)

    def _heed(self, link: _Link, event: DrafterMessage | Disconnected | Overflowed) -> None:
        if isinstance(event, Welcome):
            link.welcome, link.clock_offset = event, float("inf")
            link.failure, link.refused = "", False
        elif isinstance(event, Lost):
            session = link.sessions.get(event.session)
            if session is not None and session.is_lost(event.generation):
                session.give_up()
        elif isinstance(event, Disconnected | Overflowed):
            self._drop_all(link, event)

    def _drop_all(self, link: _Link, event: Disconnected | Overflowed) -> None:
        """After a disconnection or an overflow nothing of the link can be relied on."""
        sessions = link.sessions.values()
        if isinstance(event, Disconnected):
            link.welcome, link.failure, link.refused = None, event.reason, event.lasting
            for session in sessions:
                session.detach()
        else:
            for session in sessions:
                session.give_up()

    def _sort_out(self, link: _Link, now: float) -> None:
        """Lets go of sessions that are over, have been given up, or get no answer."""
        for session in list(link.sessions.values()):
            if session.is_silent(now):
                session.give_up()
            if not session.reachable:
                del link.sessions[session.number]
                if not session.closed:
                    link.avoid_until = now + AVOIDED_SECONDS
                    self._homeless.append(session)

    def _place_homeless(self) -> None:
        now = self._clock()
        waiting, self._homeless = self._homeless, []
        for link in self._links:
            # A request may begin where one has just ended, before the next step.
            link.sessions = {number: each for number, each in link.sessions.items() if not each.closed}
        for session in waiting:
            if session.closed:
                continue
            free = [link for link in self._links if link.has_room]
            if not free or session.retry_at > now:
                self._homeless.append(session)
                continue
            link = min(free, key=lambda link: (link.avoid_until > now, len(link.sessions)))
            assert link.welcome is not None
            link.sessions[session.number] = session
            session.open_at(link.channel, link.welcome.name)
            log.info("request %s: session %d at %s", session.request_id, session.number, link.welcome.name)
