"""What a pipeline may ask of its engine, and what it sees of a drafter in another process."""

from dataclasses import dataclass
from typing import Protocol

from outrider.speculation.living_tree import LivingTree


@dataclass(frozen=True, slots=True)
class Verify:
    """Verify at most the ``budget`` best nodes; none is plain decoding."""

    budget: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Hold the target back until growth arrives, at the latest until this time of the clock."""

    until: float


@dataclass(slots=True)
class Round:
    """What a remote drafter did since the last commit, on the target's clock.

    began: when the commit was sent. ended: when the drafter said that it had taken all its
    steps; None before. allowed: its steps. steps, seconds: its draft steps and their duration.
    opening: it began with the whole text, which the drafter had to take in first.
    """

    began: float
    allowed: int
    ended: float | None = None
    steps: int = 0
    seconds: float = 0.0
    opening: bool = False


class RemoteDraft(Protocol):
    """A drafter in another process, as a pipeline sees it."""

    tree: LivingTree
    round: Round
    steps_after_commit: int
    """Draft steps that the next commit allows; a pipeline sets it."""

    @property
    def reachable(self) -> bool:
        """Whether somebody drafts for this request at present."""
        ...
