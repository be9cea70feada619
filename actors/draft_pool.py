"""The draft workers of one target engine: who drafts for whom, and what arrives from them.

Plain Python; channels and clock are passed in. A worker that fails, hangs or talks nonsense
costs its requests its growth and nothing else: they are opened at another worker, or
decoded plainly until one is back.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from outrider.actors.feed import Feed
from outrider.actors.growth_tally import by_session, seconds_between
from outrider.actors.remote_session import RemoteSession
from outrider.actors.tracing import Trace
from outrider.actors.transport import Arrivals, Disconnected, DraftChannel, Overflowed, Received
from outrider.speculation.replication.messages import DrafterMessage, GrowthLimits, Lost, Welcome
from outrider.speculation.replication.pace import LinkPace
from outrider.speculation.replication.routing import FORGET, SETTLED, Mover, Standing, choose, slowdown
from outrider.speculation.request import Request
from outrider.speculation.statistics import SpeculationStatistics

log = logging.getLogger(__name__)

REPLICA_CAPACITY = 512
"""Nodes of a request's tree at the target."""
AVOIDED_SECONDS = 5.0


@dataclass(slots=True, eq=False)
class _Link:
    """One worker. feeds: by the numbers of their sessions.

    clock_offset: its clock against ours, at most the fastest message too much.

    drafter: name and model of the worker that was there last. pace: its own.
    used_at: when a request was last drafted for there.
    avoid_until: others are preferred, for it has failed a request lately.
    failure: why it is out of reach, for people. refused: waiting for it would not help.
    """

    channel: DraftChannel
    welcome: Welcome | None = None
    feeds: dict[int, Feed] = field(default_factory=dict)
    clock_offset: float = float("inf")
    drafter: tuple[str, str] | None = None
    pace: LinkPace = field(default_factory=LinkPace)
    used_at: float = 0.0
    avoid_until: float = 0.0
    failure: str = ""
    refused: bool = False

    def standing(self, now: float) -> Standing:
        """What is known of a worker in reach; notes that it is used, if it is."""
        assert self.welcome is not None
        if self.feeds:
            self.used_at = now
        alone = self.pace.alone
        return Standing(
            alone=alone if now - self.used_at < FORGET else None,
            sessions=len(self.feeds),
            room=self.welcome.max_sessions,
            last=alone,
            avoided=self.avoid_until > now,
            settled=any(now - feed.opened_at >= SETTLED for feed in self.feeds.values()),
        )


def _one(_: Request) -> int:
    return 1


class DraftPool:
    """Opens requests at draft workers and keeps their trees fed.

    limits: of a request's growth; ``steps`` those after the prompt. clock: monotonic seconds.
    num_drafters: how many workers a request is opened at, as far as there are so many with room.
    trace: learns what passes, and for whom.
    """

    def __init__(
        self,
        channels: Sequence[DraftChannel],
        arrivals: Arrivals,
        *,
        limits: Callable[[Request], GrowthLimits],
        vocab_size: int,
        clock: Callable[[], float],
        num_drafters: Callable[[Request], int] = _one,
        trace: Trace | None = None,
    ) -> None:
        self._trace, self._links = trace, list[_Link]()
        for channel in channels:
            self.add(channel)
        self._arrivals, self._limits = arrivals, limits
        self._vocab_size, self._clock = vocab_size, clock
        self._num_drafters = num_drafters
        self._last_number = 0
        self._homeless: list[Feed] = []
        self._mover = Mover()

    @property
    def num_connected(self) -> int:
        """Workers in reach."""
        return sum(link.welcome is not None for link in self._links)

    @property
    def connected(self) -> dict[str, str]:
        """Names of the workers in reach, by their addresses."""
        return {link.channel.address: link.welcome.name for link in self._links if link.welcome is not None}

    @property
    def failures(self) -> dict[str, str]:
        """Why workers are out of reach now, for people, by their addresses."""
        return {link.channel.address: link.failure for link in self._links if link.failure}

    @property
    def num_sessions(self) -> int:
        """Sessions that workers have, several for a request that several draft for."""
        return sum(len(link.feeds) for link in self._links)

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
            num_drafters=self._num_drafters(request),
        )
        self._homeless += session.all_feeds
        self._place_homeless()
        return session

    @property
    def addresses(self) -> list[str]:
        """Of the workers that drafting was asked of, in reach or not."""
        return [link.channel.address for link in self._links]

    def add(self, channel: DraftChannel) -> None:
        """One more worker, which need not be there yet."""
        self._links.append(_Link(channel if self._trace is None else self._trace.watch(channel)))

    def remove(self, address: str) -> None:
        """Lets go of a worker; its requests are opened elsewhere."""
        for link in [each for each in self._links if each.channel.address == address]:
            for feed in link.feeds.values():
                feed.leave()
            self._homeless += [each for each in link.feeds.values() if not each.session.closed]
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
            for feed in link.feeds.values():
                feed.absorb()
        for link in self._links:
            self._sort_out(link, now)
        if self._homeless:
            self._place_homeless()
        if len(self._links) > 1 and self._mover.is_due(now):
            self._move_one(now)

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
            for feed in link.feeds.values():
                feed.detach()
            link.channel.close()
            link.welcome = None

    @property
    def _is_awaited(self) -> bool:
        return any(link.welcome is None and not link.refused for link in self._links)

    def _receive(self, link: _Link, now: float, busy: tuple[float, float]) -> None:
        arrived, at = link.channel.receive(), 0
        if arrived and link.welcome is not None:
            link.pace.load = slowdown(max(0, len(link.feeds) - 1), link.welcome.max_sessions)
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
            feed = link.feeds.get(number)
            if feed is None:
                continue
            received = feed.receive(arrived)
            at = arrived[-1].arrived_at
            link.clock_offset = min(link.clock_offset, (now if at is None else at) - received.sent_at)
            feed.note_times(received, link.clock_offset)
            began, ended = busy[0] - link.clock_offset, busy[1] - link.clock_offset
            feed.count_overlap(seconds_between(received.messages, began, ended))

    def _heed(self, link: _Link, event: DrafterMessage | Disconnected | Overflowed) -> None:
        if isinstance(event, Welcome):
            if (event.name, event.model) != link.drafter:
                # Another one, of whom nothing is known.
                link.drafter, link.pace = (event.name, event.model), LinkPace()
            link.welcome, link.clock_offset = event, float("inf")
            link.failure, link.refused = "", False
        elif isinstance(event, Lost):
            feed = link.feeds.get(event.session)
            if feed is not None and feed.is_lost(event.generation):
                feed.give_up()
        elif isinstance(event, Disconnected | Overflowed):
            self._drop_all(link, event)

    def _drop_all(self, link: _Link, event: Disconnected | Overflowed) -> None:
        """After a disconnection or an overflow nothing of the link can be relied on."""
        feeds = link.feeds.values()
        if isinstance(event, Disconnected):
            link.welcome, link.failure, link.refused = None, event.reason, event.lasting
            for feed in feeds:
                feed.detach()
        else:
            for feed in feeds:
                feed.give_up()

    def _sort_out(self, link: _Link, now: float) -> None:
        """Lets go of feeds that are over, have been given up, or get no answer."""
        for number, feed in list(link.feeds.items()):
            if feed.is_silent(now):
                feed.give_up()
            if not feed.reachable:
                del link.feeds[number]
                if not feed.session.closed:
                    link.avoid_until = now + AVOIDED_SECONDS
                    self._homeless.append(feed)

    def _place_homeless(self) -> None:
        now = self._clock()
        waiting, self._homeless = self._homeless, []
        for link in self._links:
            # A request may begin where one has just ended, before the next step.
            link.feeds = {number: each for number, each in link.feeds.items() if not each.session.closed}
        standings = self._standings(now)
        # Who has nobody comes first.
        for feed in sorted(waiting, key=lambda feed: feed.session.reachable):
            if feed.session.closed:
                continue
            found = None if feed.retry_at > now else self._place_for(feed, standings)
            if found is None:
                self._homeless.append(feed)
            else:
                self._open_at(found, feed)
                standings[found] = found.standing(now)

    def _place_for(self, feed: Feed, standings: dict[_Link, Standing]) -> _Link | None:
        """Where to open a feed: not where another of the same request is; None: there is no room."""
        number = feed.session.number
        free = [link for link, each in standings.items() if each.has_room and number not in link.feeds]
        if free:
            return free[choose([standings[link] for link in free])]
        return None if feed.session.reachable else self._make_room()

    def _standings(self, now: float) -> dict[_Link, Standing]:
        return {link: link.standing(now) for link in self._links if link.welcome is not None}

    def _make_room(self) -> _Link | None:
        """Lets a drafter go whose request has others; its worker, or None."""
        for link in self._links:
            for number, feed in link.feeds.items():
                if len(feed.session.feeds) > 1:
                    feed.leave()
                    del link.feeds[number]
                    self._homeless.append(feed)
                    return link
        return None

    def _move_one(self, now: float) -> None:
        """Has the request that has been longest at a slow worker go on at a faster one, if it is time."""
        move = self._mover.look(self._standings(now), now)
        if move is None:
            return
        slow, fast = move
        movable = [feed for number, feed in slow.feeds.items() if number not in fast.feeds]
        feed = min(movable, key=lambda feed: feed.opened_at, default=None)
        if feed is not None and now - feed.opened_at >= SETTLED:
            del slow.feeds[feed.session.number]
            self._open_at(fast, feed, move=True)

    def _open_at(self, link: _Link, feed: Feed, *, move: bool = False) -> None:
        assert link.welcome is not None
        session, name = feed.session, link.welcome.name
        link.feeds[session.number] = feed
        if self._trace is not None:
            self._trace.opened(session.number, session.request.request_id)
        (feed.move_to if move else feed.open_at)(link.channel, name, link.pace)
        log.info("request %s: session %d at %s", session.request.request_id, session.number, name)
