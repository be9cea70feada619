"""One request's drafting by draft workers: the target's text and tree, and the drafters that feed it."""

from collections.abc import Callable

from outrider.actors.feed import Feed
from outrider.speculation.living_tree import LivingTree, Reroot
from outrider.speculation.proposers import Proposers
from outrider.speculation.replication.messages import GrowthLimits
from outrider.speculation.replication.text import CommittedText
from outrider.speculation.request import Request
from outrider.speculation.statistics import SpeculationStatistics
from outrider.speculation.tree import Law
from outrider.speculation.types import IntArray


class RemoteSession:
    """A ``DraftSession`` whose tree grows elsewhere, at one worker or at several.

    number: of the session, the same at every worker. The tree outlives generations: what one
    drafter has grown is as good a guess after its death. num_drafters: how many to draft at once, each
    at a worker of its own.
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
        num_drafters: int = 1,
    ) -> None:
        self.number, self.request, self.limits = number, request, limits
        self.vocab_size, self.stats, self.clock = vocab_size, stats, clock
        self.tree = LivingTree(Law.COUPLED, capacity)
        self.text = CommittedText(request.prompt_ids)
        self.steps_after_commit = limits.steps
        self.closed = False
        self.feeds: list[Feed] = []
        """Those where somebody drafts at present; they keep it so."""
        self.all_feeds = [Feed(self) for _ in range(num_drafters)]
        self._proposers = Proposers()
        self._generation = 0

    @property
    def reachable(self) -> bool:
        """Whether a worker drafts for this request."""
        return bool(self.feeds)

    def next_generation(self) -> int:
        """A number that no generation of this session has had, at whatever worker."""
        self._generation += 1
        return self._generation

    def expect_nodes_of(self, drafter: str) -> None:
        """The nodes that come into the tree next are this drafter's."""
        self._proposers.note(self.tree.counters[1], drafter)

    def proposers(self, slots: IntArray) -> dict[str, int]:
        """See ``DraftSession.proposers``: of several, the one that was first."""
        return self._proposers.count(self.tree.births[slots])

    def commit(self, tokens: IntArray) -> Reroot:
        """See ``DraftSession.commit``; the drafters are told."""
        base = self.text.length
        self.text.append(tokens)
        reroot = self.tree.reroot(tokens)
        self._proposers.keep_from(self.tree)
        now = self.clock()
        for feed in self.feeds:
            feed.commit(tokens, base, reroot, now)
        return reroot

    def close(self) -> None:
        """The request is over."""
        for feed in self.all_feeds:
            feed.detach()
        self.tree.clear()
        self.closed = True
