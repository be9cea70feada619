"""The target network as the engine sees it."""

from collections import abc
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from outrider.speculation.tree import DraftTree
from outrider.speculation.types import IntArray


class Sequence(Protocol):
    """What a runner keeps for one request.

    length: committed tokens that are cached. room: positions that it has memory for.
    """

    length: int

    @property
    def room(self) -> int: ...

    def reserve(self, positions: int) -> bool:
        """Makes room for so many positions, of nodes as of text; False leaves things as they were."""
        ...

    def publish(self, tokens: IntArray) -> None:
        """Lets later requests begin with what is cached of the committed text ``tokens``."""
        ...

    def close(self) -> None:
        """Frees it."""
        ...


AnySequence = TypeVar("AnySequence", bound=Sequence)


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeQuery(Generic[AnySequence]):
    """What one sequence asks of a forward.

    tokens: int64 ``[k]``, the next committed tokens, which are not cached yet.
    tree: the nodes below the last of them; None asks for no logits of theirs, only to cache the tokens.
    text_logits: of how many tokens the logits are wanted as well: the last ones, or, where there is a
        tree, those before its root.
    """

    sequence: AnySequence
    tokens: IntArray
    tree: DraftTree | None
    text_logits: int = 0

    @property
    def num_rows(self) -> int:
        """Rows that it takes of the forward."""
        return len(self.tokens) + (0 if self.tree is None else len(self.tree))


class TargetRunner(Protocol[AnySequence]):
    """See ``ModelRunner`` for the meaning."""

    @property
    def max_model_len(self) -> int: ...

    def open(
        self, text: IntArray, like: tuple[AnySequence, int] | None = None, reusable: int | None = None
    ) -> AnySequence | None: ...

    def verify(self, queries: abc.Sequence[TreeQuery[AnySequence]]) -> list[torch.Tensor]: ...

    def accept(self, sequence: AnySequence, nodes: IntArray) -> None: ...
