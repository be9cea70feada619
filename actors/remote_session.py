"""One request's drafting by a draft worker: the target's tree, and the generation that feeds it."""

from collections.abc import Callable

from outrider.actors.growth_tally import NO_GENERATION, Tally, tally
from outrider.actors.transport import DraftChannel, Received
from outrider.speculation.living_tree import LivingTree, Reroot
from outrider.speculation.pipelines.actions import Round
from outrider.speculation.replication.messages import Close, Commit, GrowthLimits, Open, TargetMessage
from outrider.speculation.replication.replica import GapError, Replica
from outrider.speculation.replication.text import CommittedText
from outrider.speculation.request import Request
from outrider.speculation.statistics import SpeculationStatistics
from outrider.speculation.tree import Law
from outrider.speculation.types import IntArray

MAX_PENDING_NODES = 4096
"""Nodes that one step takes in for a request; more is a flood and ends the generation."""
FIRST_BACKOFF = 0.05
MAX_BACKOFF = 5.0
"""Seconds before a request is opened again at a drafter that lost it; doubled each time."""
SILENCE = 1.0
"""Seconds without a sign that a commit was seen, after which a generation is given up.

A long prompt may keep a drafter silent for longer: ten times the backoff comes on top."""


class RemoteSession:
    """A ``DraftSession`` whose tree grows elsewhere.

    number: of the session, the same at every worker. The tree outlives generations: what one
    drafter has grown is as good a guess after its death.
    """

    def __init__(
        self,
        number: int,
        request: Request,
        *,
        limits: GrowthLimits,
        vocab_size: int,
        capacity: int,
        stats: SpeculationStatistics,
        clock: Callable[[], float],
    ) -> None:
        self.number, self.stats = number, stats
        self.name = "remote"
        self.tree = LivingTree(Law.COUPLED, capacity)
        self.steps_after_commit = limits.steps
        self.retry_at = 0.0
        self.closed = False
        self._request, self._limits = request, limits
        self._vocab_size, self._clock = vocab_size, clock
        self._text = CommittedText(request.prompt_ids)
        self._channel: DraftChannel | None = None
        self._replica: Replica | None = None
        self._generation = self._sequence = 0
        self._pending: list[Tally] = []
        self._heard = False
        self._unseen_since = 0.0
        self._backoff = FIRST_BACKOFF
        self.round = Round(began=clock(), allowed=0)

    @property
    def request_id(self) -> str:
        """Of the request that is drafted for."""
        return self._request.request_id

    @property
    def reachable(self) -> bool:
        """Whether a worker drafts for this request."""
        return self._replica is not None

    @property
    def channel(self) -> DraftChannel | None:
        """The worker's, while it drafts for this request."""
        return self._channel

    def open_at(self, channel: DraftChannel, name: str) -> None:
        """Starts the next generation there, with everything that the drafter must know."""
        self._generation += 1
        self._sequence = 0
        self.stats.generations += 1
        self.stats.drafter_failovers += self.name not in ("remote", name)
        self.name = name
        self._channel, self._pending, self._heard = channel, [], False
        self._replica = Replica(self.tree, self._text, self._vocab_size)
        request, now = self._request, self._clock()
        self._unseen_since = now
        self.round = Round(began=now, allowed=self.steps_after_commit, opening=True)
        self._send(
            Open(
                session=self.number,
                generation=self._generation,
                token_ids=self._text.ids,
                prompt_length=len(request.prompt_ids),
                params=request.params,
                choice=request.choice,
                limits=GrowthLimits(
                    width=self._limits.width,
                    children=self._limits.children,
                    steps=self.steps_after_commit,
                    min_score=self._limits.min_score,
                ),
            )
        )

    def receive(self, arrived: list[Received]) -> Tally:
        """Keeps growth of this generation for the next ``absorb``; ``arrived`` holds nothing else."""
        generation = NO_GENERATION if self._replica is None else self._generation
        received, stats = tally(arrived, generation, self._sequence), self.stats
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

    def absorb(self) -> None:
        """Places what was received in the tree; gives the generation up if that makes no sense."""
        pending, self._pending = self._pending, []
        if self._replica is None or not pending:
            return
        try:
            self._require_plausible(pending)
            seen_before = self._replica.seen_commit
            messages = [message for received in pending for message in received.messages]
            self.stats.stale_nodes += self._replica.apply(messages).stale
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
        """Nobody drafts for this request any more."""
        if self._channel is not None:
            self._send(Close(session=self.number, generation=self._generation))
        self._channel = self._replica = None
        self._pending = []

    def is_lost(self, generation: int) -> bool:
        """Whether a drafter that lost this generation means the present one."""
        return self._replica is not None and generation == self._generation

    def is_silent(self, now: float) -> bool:
        """Whether the drafter has not said for too long that it saw the last commit."""
        if self._replica is None or (self._heard and self._replica.seen_commit == self._sequence):
            return False
        return now - self._unseen_since > SILENCE + 10 * self._backoff

    def commit(self, tokens: IntArray) -> Reroot:
        """See ``DraftSession.commit``; the drafter is told."""
        base = self._text.length
        self._text.append(tokens)
        reroot = self.tree.reroot(tokens)
        if self._replica is None:
            return reroot
        self._replica.committed(reroot)
        now = self._clock()
        if self._replica.seen_commit == self._sequence:
            self._unseen_since = now
        self._sequence += 1
        self.round = Round(began=now, allowed=self.steps_after_commit)
        self._send(
            Commit(
                session=self.number,
                generation=self._generation,
                sequence=self._sequence,
                base_length=base,
                tokens=tokens,
                prefix_hash=self._text.prefix_hash,
                steps=self.steps_after_commit,
            )
        )
        return reroot

    def close(self) -> None:
        """The request is over."""
        self.detach()
        self.tree.clear()
        self.closed = True

    def _send(self, message: TargetMessage) -> None:
        assert self._channel is not None
        self.stats.sent_bytes += self._channel.send(message)

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
