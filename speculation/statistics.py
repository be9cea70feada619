"""Counts of what speculation did. Raw counts only; everything else is derived when read."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise, zip_longest
from types import MappingProxyType

NOBODY: Mapping[str, int] = MappingProxyType({})


@dataclass(kw_only=True)
class SpeculationStatistics:
    """Mutable counts of one request, engine or link; ``merge`` adds them up.

    num_drafts: verifications of at least one draft token.
    num_draft_tokens, num_accepted_tokens: over those; without the target's own tokens.
    num_accepted_tokens_per_pos: entry i counts drafts whose path was accepted to depth i + 1.
    num_spec_steps: target steps with speculation switched on, empty trees included.
    target_steps, target_rows, target_seconds: forwards of the target, query rows, duration.
    draft_steps, draft_rows, draft_seconds: the same of the drafter.
    num_output_tokens: committed tokens.
    prefill_seconds: caching pieces of the text at the target, before its first or next token.
    cached_tokens: that were found cached and so were not computed. preemptions: for want of memory.
    accepted_by_drafter: accepted draft tokens by who proposed them, of several the first.
    reroot_hits, reroot_misses: re-roots that kept, or lost, the tree.
    wait_seconds: the target was held back for the drafter.
    accepted_prediction_tokens, rejected_prediction_tokens: of the caller's own prediction, verified and
        accepted or not.

    Of a drafter in another process:
    growth_messages, growth_nodes, growth_bytes: received. sent_bytes: to it.
    stale_nodes, stale_messages: arrived too late to be placed, or of an earlier generation.
    steps_by_choice: target steps by how they came about, see ``pipelines.actions.Choice``.
    drafting_switches: how often drafting was stopped or resumed, for it had not paid.
    overlapped_draft_seconds: the part of draft_seconds that the target's steps hid.
    generations: how often the request was opened at a worker; drafter_failovers: at another one, for
        one had failed; drafter_moves: at another one, for that should be faster.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    num_spec_steps: int = 0
    target_steps: int = 0
    target_rows: int = 0
    target_seconds: float = 0.0
    draft_steps: int = 0
    draft_rows: int = 0
    draft_seconds: float = 0.0
    num_output_tokens: int = 0
    prefill_seconds: float = 0.0
    cached_tokens: int = 0
    preemptions: int = 0
    accepted_by_drafter: dict[str, int] = field(default_factory=dict)
    reroot_hits: int = 0
    reroot_misses: int = 0
    wait_seconds: float = 0.0
    growth_messages: int = 0
    growth_nodes: int = 0
    growth_bytes: int = 0
    sent_bytes: int = 0
    stale_nodes: int = 0
    stale_messages: int = 0
    steps_by_choice: dict[str, int] = field(default_factory=dict)
    drafting_switches: int = 0
    overlapped_draft_seconds: float = 0.0
    generations: int = 0
    drafter_failovers: int = 0
    drafter_moves: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0

    def record_verification(
        self, *, num_draft_tokens: int, num_accepted_tokens: int, proposers: Mapping[str, int] = NOBODY
    ) -> None:
        """Counts one verification; an empty tree is a step but no draft.

        proposers: how many of the accepted tokens each drafter proposed, where that is known.

        Raises:
            ValueError: more was accepted than drafted, or a count is negative.
        """
        if not 0 <= num_accepted_tokens <= num_draft_tokens:
            raise ValueError(f"{num_accepted_tokens} of {num_draft_tokens} draft tokens cannot be accepted")
        self.num_spec_steps += 1
        self.num_drafts += num_draft_tokens > 0
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted_tokens
        if not num_accepted_tokens:
            return
        self.num_accepted_tokens_per_pos = _added(self.num_accepted_tokens_per_pos, [1] * num_accepted_tokens)
        for name, count in proposers.items():
            self.accepted_by_drafter[name] = self.accepted_by_drafter.get(name, 0) + count

    @property
    def mean_acceptance_length(self) -> float:
        """1 + accepted / drafts, bonus token included; 1.0 when nothing was drafted."""
        return 1.0 + (self.num_accepted_tokens / self.num_drafts if self.num_drafts else 0.0)

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted / drafted tokens; 0.0 when nothing was drafted."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def acceptance_rate_per_pos(self) -> list[float]:
        """Entry i: share of drafts accepted to depth i + 1; empty when nothing was accepted."""
        return [count / self.num_drafts for count in self.num_accepted_tokens_per_pos]

    @property
    def overlap_ratio(self) -> float:
        """Share of the drafter's time that the target's steps hid; 0.0 without a remote drafter."""
        return self.overlapped_draft_seconds / self.draft_seconds if self.draft_seconds else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes on the wire, both ways, per output token; 0.0 without output."""
        total = self.growth_bytes + self.sent_bytes
        return total / self.num_output_tokens if self.num_output_tokens else 0.0

    @property
    def acceptance_histogram(self) -> list[int]:
        """Entry j: drafts of which exactly j tokens were accepted; sums to ``num_drafts``."""
        reached = [self.num_drafts, *self.num_accepted_tokens_per_pos, 0]
        return [here - beyond for here, beyond in pairwise(reached)]

    def merge(self, other: "SpeculationStatistics") -> None:
        """Adds ``other``'s counts to these."""
        for name in (each.name for each in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, list):
                setattr(self, name, _added(mine, theirs))
            elif isinstance(mine, dict):
                setattr(self, name, dict(Counter(mine) + Counter(theirs)))
            else:
                setattr(self, name, mine + theirs)

    def as_dict(self) -> dict[str, object]:
        """For a reply: vLLM's ``metrics.speculative_decoding``, then what it does not have."""
        return {
            "mean_acceptance_length": self.mean_acceptance_length,
            "draft_acceptance_rate": self.draft_acceptance_rate,
            "acceptance_histogram": self.acceptance_histogram,
            "num_spec_steps": self.num_spec_steps,
            "num_accepted_draft_tokens": self.num_accepted_tokens,
            "num_draft_tokens": self.num_draft_tokens,
            "num_drafts": self.num_drafts,
            "acceptance_rate_per_pos": self.acceptance_rate_per_pos,
            "num_output_tokens": self.num_output_tokens,
            "prefill_seconds": self.prefill_seconds,
            "cached_tokens": self.cached_tokens,
            "preemptions": self.preemptions,
            "target_steps": self.target_steps,
            "target_rows": self.target_rows,
            "target_seconds": self.target_seconds,
            "draft_steps": self.draft_steps,
            "draft_rows": self.draft_rows,
            "draft_seconds": self.draft_seconds,
            "accepted_by_drafter": dict(self.accepted_by_drafter),
            "reroot_hits": self.reroot_hits,
            "reroot_misses": self.reroot_misses,
            "wait_seconds": self.wait_seconds,
            "growth_messages": self.growth_messages,
            "growth_nodes": self.growth_nodes,
            "growth_bytes": self.growth_bytes,
            "sent_bytes": self.sent_bytes,
            "bytes_per_token": self.bytes_per_token,
            "stale_nodes": self.stale_nodes,
            "stale_messages": self.stale_messages,
            "steps_by_choice": dict(self.steps_by_choice),
            "drafting_switches": self.drafting_switches,
            "overlapped_draft_seconds": self.overlapped_draft_seconds,
            "overlap_ratio": self.overlap_ratio,
            "generations": self.generations,
            "drafter_failovers": self.drafter_failovers,
            "drafter_moves": self.drafter_moves,
            "accepted_prediction_tokens": self.accepted_prediction_tokens,
            "rejected_prediction_tokens": self.rejected_prediction_tokens,
        }


def _added(left: Sequence[int], right: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip_longest(left, right, fillvalue=0)]


@dataclass(kw_only=True)
class WorkerStatistics:
    """Mutable counts of one draft worker.

    began_at: on its monotonic clock, as ``Growth.sent_at``; ended_at: at the last look.
    draft_steps, draft_rows, draft_seconds: forwards, their rows, and their duration.
    idle_seconds: waited because there was nothing to draft, the worker's bubbles.
    sessions_opened, sessions_lost: generations, and those that it could not follow.
    commits, duplicate_commits: heeded, and known already.
    reroot_hits, reroot_misses: commits that kept, or lost, a tree.
    growth_messages, growth_nodes: sent.
    """

    began_at: float
    ended_at: float = 0.0
    draft_steps: int = 0
    draft_rows: int = 0
    draft_seconds: float = 0.0
    idle_seconds: float = 0.0
    sessions_opened: int = 0
    sessions_lost: int = 0
    commits: int = 0
    duplicate_commits: int = 0
    reroot_hits: int = 0
    reroot_misses: int = 0
    growth_messages: int = 0
    growth_nodes: int = 0
