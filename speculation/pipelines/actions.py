"""What a pipeline may ask of its engine, and what it sees of a drafter in another process."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from outrider.speculation.living_tree import LivingTree
from outrider.speculation.replication.pace import GrowthTimes
from outrider.speculation.types import FloatArray


class Choice(enum.StrEnum):
    """How a step came about, for the statistics.

    AT_ONCE: with what there was, if only the root. LINGERED: held back, for growth was worth it.
    WAITED: held back for an answer. NO_DRAFTER: nobody is in reach.
    OFF: steps with the drafter were slower, or one without it is due to compare with.
    """

    AT_ONCE = "at_once"
    LINGERED = "lingered"
    WAITED = "waited"
    NO_DRAFTER = "no_drafter"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Verify:
    """Verify at most the ``budget`` best nodes; none is plain decoding."""

    budget: int
    choice: Choice = Choice.AT_ONCE


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
    behind: the round before had not ended when it began.
    """

    began: float
    allowed: int
    ended: float | None = None
    steps: int = 0
    seconds: float = 0.0
    opening: bool = False
    behind: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Linger:
    """Hold the target back while growth that is on its way is worth it to the batch, then verify.

    budget: as of ``Verify``. due: when the growth of one more draft step should arrive, and until when
    it is counted on; every: seconds between later ones.
    gains: ``[k]``, accepted tokens that 1, 2, ... k more draft steps are expected to bring.
    """

    budget: int
    due: float
    until: float
    every: float
    gains: FloatArray


class RemoteFeed(Protocol):
    """A drafter in another process, as a pipeline sees it. times: when its growth arrived."""

    round: Round
    times: GrowthTimes


class RemoteDraft(Protocol):
    """A request's tree that drafters in other processes feed."""

    tree: LivingTree
    steps_after_commit: int
    """Draft steps that the next commit allows each of them; a pipeline sets it."""

    @property
    def feeds(self) -> Sequence[RemoteFeed]:
        """Those who draft for this request at present."""
        ...
