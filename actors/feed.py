"""One drafter's part in a request: the generation that feeds the request's tree."""

from typing import TYPE_CHECKING

from outrider.actors.growth_tally import NO_GENERATION, Tally, tally
from outrider.actors.transport import DraftChannel, Received
from outrider.speculation.living_tree import Reroot
from outrider.speculation.pipelines.actions import Round
from outrider.speculation.replication.messages import Close, Commit, GrowthLimits, Open, TargetMessage
from outrider.speculation.replication.pace import GrowthTimes, LinkPace
from outrider.speculation.replication.replica import GapError, Replica
from outrider.speculation.types import IntArray

if TYPE_CHECKING:
    from outrider.actors.remote_session import RemoteSession

MAX_PENDING_NODES = 4096
"""Nodes that one step takes in from a drafter for a request; more is a flood and ends the generation."""
FIRST_BACKOFF = 0.05
MAX_BACKOFF = 5.0
"""Seconds before a request is opened again at a drafter that lost it; doubled each time."""
SILENCE = 1.0
"""Seconds without a sign that a commit was seen, after which a generation is given up.

A long prompt may keep a drafter silent for longer: ten times the backoff comes on top."""


class Feed:
    """A place for one drafter, who may be replaced: what fails here costs only what grew here.

    name: of the drafter, the last one if there is none now; empty before the first.
    retry_at: not to be opened before. opened_at: when the present generation began.
    """

    def __init__(self, session: "RemoteSession") -> None:
        self.session, self._stats, self._clock = session, session.stats, session.clock
        self.name = ""
        self.retry_at = self.opened_at = 0.0
        self.channel: DraftChannel | None = None
        """The worker's, while it drafts for this request."""
        self._replica: Replica | None = None
        self._generation = self._sequence = 0
        self._pending: list[Tally] = []
        self._heard = False
        self._unseen_since = 0.0
        self._backoff = FIRST_BACKOFF
        self.round = Round(began=0.0, allowed=0)
        self.times = GrowthTimes(LinkPace(), 0.0)
        """When growth of the present generation came in."""

    @property
    def reachable(self) -> bool:
        """Whether a worker drafts here."""
        return self._replica is not None

    def move_to(self, channel: DraftChannel, name: str, pace: LinkPace) -> None:
        """Goes on with another drafter, which is nobody's failure."""
        self.leave()
        self._stats.drafter_moves += 1
        self.open_at(channel, name, pace)

    def open_at(self, channel: DraftChannel, name: str, pace: LinkPace) -> None:
        """Starts the next generation there, with everything that the drafter must know."""
        session, stats, now = self.session, self._stats, self._clock()
        self.opened_at = now
        self._generation, self._sequence = session.next_generation(), 0
        stats.generations += 1
        stats.drafter_failovers += self.name not in ("", name)
        self.name, self.channel = name, channel
        self._pending, self._heard, self._unseen_since = [], False, now
        self._replica = Replica(session.tree, session.text, session.vocab_size)
        self.round = Round(began=now, allowed=session.steps_after_commit, opening=True)
        self.times = GrowthTimes(pace, now)
        session.feeds.append(self)
        request, limits = session.request, session.limits
        self._send(
            Open(
                session=session.number,
                generation=self._generation,
                token_ids=session.text.ids,
                prompt_length=len(request.prompt_ids),
                params=request.params,
                choice=request.choice,
                limits=GrowthLimits(
                    width=limits.width,
                    children=limits.children,
                    steps=session.steps_after_commit,
                    min_score=limits.min_score,
                ),
            )
        )

    def receive(self, arrived: list[Received]) -> Tally:
        """Keeps growth of this generation for the next ``absorb``; ``arrived`` holds nothing else."""
        generation = NO_GENERATION if self._replica is None else self._generation
        received, stats = tally(arrived, generation, self._sequence), self._stats
        stats.stale_messages += received.stale_messages
        stats.stale_nodes += received.stale_nodes
        if received.messages:
            stats.growth_messages += len(received.messages)
            stats.growth_nodes += received.nodes
            stats.growth_bytes += received.num_bytes
            stats.draft_steps += received.draft_steps
            stats.draft_rows += received.draft_rows
            stats.draft_seconds += received.draft_seconds
            self._pending.append(received)
        return received

    def note_times(self, received: Tally, clock_offset: float) -> None:
        """Learns when this growth arrived. clock_offset: from the drafter's clock to ours."""
        if received.messages:
            self.times.arrived(received.messages, clock_offset)

    def count_overlap(self, seconds: float) -> None:
        """So much of the drafting was hidden by the target's last step."""
        self._stats.overlapped_draft_seconds += seconds

    def absorb(self) -> None:
        """Places what was received in the tree; gives the generation up if that makes no sense."""
        pending, self._pending = self._pending, []
        if self._replica is None or not pending:
            return
        try:
            self._require_plausible(pending)
            seen_before = self._replica.seen_commit
            messages = [message for received in pending for message in received.messages]
            self.session.expect_nodes_of(self.name)
            self._stats.stale_nodes += self._replica.apply(messages).stale
        except GapError:
            self.give_up()
            return
        self._note_progress(pending, seen_before)

    def give_up(self) -> None:
        """Ends the generation; another one may begin after a while, longer each time."""
        now = self._clock()
        self.detach()
        self.retry_at = now + self._backoff
        self._backoff = min(MAX_BACKOFF, 2 * self._backoff)

    def detach(self) -> None:
        """Nobody drafts here any more."""
        if self._replica is None:
            return
        self._send(Close(session=self.session.number, generation=self._generation))
        self.session.feeds.remove(self)
        self.channel = self._replica = None
        self._pending = []

    def leave(self) -> None:
        """Detaches from a drafter that has not failed."""
        self.detach()
        self.name = ""

    def is_lost(self, generation: int) -> bool:
        """Whether a drafter that lost this generation means the present one."""
        return self._replica is not None and generation == self._generation

    def is_silent(self, now: float) -> bool:
        """Whether the drafter has not said for too long that it saw the last commit."""
        if self._replica is None or (self._heard and self._replica.seen_commit == self._sequence):
            return False
        return now - self._unseen_since > SILENCE + 10 * self._backoff

    def commit(self, tokens: IntArray, base: int, reroot: Reroot, now: float) -> None:
        """Tells the drafter of tokens that are in text and tree already, behind ``base`` others."""
        assert self._replica is not None
        session = self.session
        self._replica.committed(reroot)
        if self._replica.seen_commit == self._sequence:
            self._unseen_since = now
        self._sequence += 1
        behind = self.round.ended is None and self.round.allowed != 0
        self.round = Round(began=now, allowed=session.steps_after_commit, behind=behind)
        self.times.committed(self._sequence, now)
        self._send(
            Commit(
                session=session.number,
                generation=self._generation,
                sequence=self._sequence,
                base_length=base,
                tokens=tokens,
                prefix_hash=session.text.prefix_hash,
                steps=session.steps_after_commit,
            )
        )

    def _send(self, message: TargetMessage) -> None:
        assert self.channel is not None
        self._stats.sent_bytes += self.channel.send(message)

    def _require_plausible(self, pending: list[Tally]) -> None:
        if sum(received.nodes for received in pending) > MAX_PENDING_NODES:
            raise GapError("more growth than anyone can use")
        if max(received.seen_commit for received in pending) > self._sequence:
            raise GapError(f"the drafter has seen more than {self._sequence} commits")

    def _note_progress(self, pending: list[Tally], seen_before: int) -> None:
        assert self._replica is not None
        now = self._clock()
        seen = self._replica.seen_commit
        if not self._heard or seen > seen_before:
            self._unseen_since = now
        self._heard = True
        if seen > 0:
            self._backoff = FIRST_BACKOFF
        for received in pending:
            self.round.steps += received.round_steps
            self.round.seconds += received.round_seconds
            if received.round_ended:
                self.round.ended = now
