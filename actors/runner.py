"""The target network as the engine sees it."""

from collections import abc
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from outrider.speculation.tree import DraftTree
from outrider.speculation.types import IntArray


class Sequence(Protocol):
    """What a runner keeps for one request."""

    def close(self) -> None:
        """Frees it."""
        ...


AnySequence = TypeVar("AnySequence", bound=Sequence)


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeQuery(Generic[AnySequence]):
    """What one sequence asks of a forward: logits after its last committed token and after each node.

    root: the last committed token, the only one that is not cached yet.
    """

    sequence: AnySequence
    root: int
    tree: DraftTree


class TargetRunner(Protocol[AnySequence]):
    """See ``ModelRunner`` for the meaning."""

    @property
    def max_model_len(self) -> int: ...

    def open(self, max_tokens: int) -> AnySequence: ...

    def prefill(self, sequence: AnySequence, tokens: IntArray) -> None: ...

    def verify(self, queries: abc.Sequence[TreeQuery[AnySequence]]) -> list[torch.Tensor]: ...

    def accept(self, sequence: AnySequence, nodes: IntArray) -> None: ...
