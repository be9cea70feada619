"""What the API asks of whatever generates: an engine in this process, or a cluster's targets."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from outrider.cluster.model_card import ModelCard
from outrider.speculation.errors import OutriderError
from outrider.speculation.request import Completion, Request, StepOutput


class UnavailableError(OutriderError):
    """Nobody can serve now; it may be different soon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What a backend consists of at one moment.

    serving: targets that serve; requests have a chance while there are any. running, waiting: requests.
    kv_cache_usage: share of the KV blocks held, of the fullest target. drafters: connected draft
    workers. members: a row for people on each process, with at least name, role and phase.
    """

    serving: int
    running: int
    waiting: int
    kv_cache_usage: float
    drafters: int
    members: list[dict[str, Any]]


class Backend(Protocol):
    """Serves requests that were prepared with its ``card``; used from one event loop."""

    card: ModelCard

    @property
    def serving(self) -> int:
        """Targets that serve, at once and without asking anybody."""
        ...

    def stream(
        self, requests: Sequence[Request], interval: float
    ) -> AsyncGenerator[list[tuple[int, StepOutput | Completion]]]:
        """What happens to the requests, by their index, until the last one's completion.

        interval: seconds between two lots after the first; the end of a request does not wait for it.
        What is left when the caller closes the iterator is dropped.

        Raises:
            UnavailableError: nobody serves, and nobody came to.
            OutriderError: a request failed.
        """
        ...

    async def health(self) -> Health:
        """Figures for people and metrics."""
        ...

    async def close(self) -> None:
        """Ends what was started for it."""
        ...
