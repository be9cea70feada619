"""What a target engine tells whoever wants to see where the time went."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from outrider.actors.transport import DraftChannel
from outrider.speculation.request import StepOutput
from outrider.speculation.types import IntArray, Verdict

if TYPE_CHECKING:
    from outrider.actors.request_run import RequestRun
    from outrider.actors.target_engine import Part

Span = tuple[float, float]
"""When something began and ended, on the engine's clock."""


class Trace(Protocol):
    """Is called on the engine's thread in the middle of its work, so it notes things and returns."""

    def drafted(self, span: Span, runs: Sequence["RequestRun"], rows: Sequence[int]) -> None:
        """A draft step in this process, with so many rows for each of these requests."""
        ...

    def took_growth(self, span: Span) -> None:
        """What had arrived from draft workers was placed in the trees."""
        ...

    def waited(self, span: Span, runs: Sequence["RequestRun"]) -> None:
        """The target was held back for the drafters of these requests."""
        ...

    def judged(self, tokens: Sequence[IntArray]) -> None:
        """The target's own tokens in the step at hand, for each request that verifies a tree.

        tokens: int64 ``[nodes + 1]`` each, as for ``Verifier.verify``.
        """
        ...

    def stepped(
        self,
        span: Span,
        forward: Span,
        parts: Sequence["Part"],
        verdicts: Sequence[Verdict | None],
        outputs: Sequence[StepOutput | None],
    ) -> None:
        """A whole step is over, of which the forward was a part."""
        ...

    def opened(self, session: int, request_id: str) -> None:
        """Messages of this session will be about this request."""
        ...

    def watch(self, channel: DraftChannel) -> DraftChannel:
        """A channel that does the same and lets the trace know what passes."""
        ...
