"""What crosses the boundaries between drafter, verifier, pipeline and engine.

Policy code sees numpy arrays and these dataclasses, never tensors or models.
"""

import enum
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from outrider.speculation.tree import DraftTree, Law

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


class FinishReason(enum.StrEnum):
    """Why a request ended; OpenAI's two names."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Outcome of verifying one tree.

    accepted: node indices of the accepted path, from the root downwards (may be empty).
    token: the target's own token after that path: the ``bonus_token`` when the path
        ends in a leaf, the ``recovered_token`` when the target left the tree.
    """

    accepted: IntArray
    token: int

    @property
    def num_accepted_tokens(self) -> int:
        """Accepted draft tokens, without the target's own one."""
        return len(self.accepted)


class Verifier(Protocol):
    """A rule that decides which path of a tree the target would have taken."""

    name: str
    laws: frozenset[Law]
    """Laws of siblings for which the rule is exact; others are refused."""

    def verify(self, tree: DraftTree, target_tokens: IntArray) -> Verdict:
        """Judges ``tree``.

        target_tokens: int64 ``[nodes + 1]``, the token that the target itself takes after
            the root (index 0) and after each node i (index i + 1).

        Raises:
            ValueError: the lengths differ.
        """
        ...


class Drafter(Protocol):
    """Guesses continuations of one request. It holds no truth: everything is verified."""

    law: Law

    def propose(self, committed: IntArray, budget: int) -> DraftTree:
        """A tree of at most ``budget`` nodes that continues ``committed`` (int64 ``[length]``)."""
        ...
