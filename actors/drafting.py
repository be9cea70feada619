"""What one request's drafting session looks like; prompt lookup and the caller's prediction as such.

A session owns the request's living tree. The engine asks it to grow, takes the best subtree,
and tells it what was committed.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from outrider.speculation.drafters.ngram import NgramDrafter
from outrider.speculation.drafters.prediction import PredictionDrafter
from outrider.speculation.living_tree import LivingTree, Reroot
from outrider.speculation.request import Request
from outrider.speculation.statistics import SpeculationStatistics
from outrider.speculation.tree import MAX_TREE_DEPTH, ROOT
from outrider.speculation.types import IntArray


class DraftSession(Protocol):
    """One request's drafting."""

    tree: LivingTree

    def proposers(self, slots: IntArray) -> dict[str, int]:
        """How many of these nodes each has proposed, by name."""
        ...

    def commit(self, tokens: IntArray) -> Reroot:
        """Moves the root down newly committed tokens (int64 ``[count]``)."""
        ...

    def close(self) -> None:
        """Frees what the session holds."""
        ...


class DraftEngine(Protocol):
    """Opens sessions for requests."""

    def open(self, request: Request, stats: SpeculationStatistics) -> DraftSession:
        """stats: of the request; what only the session sees is counted there.

        Raises:
            OutOfBlocksError: the draft model's KV cache has no room for it.
        """
        ...


@runtime_checkable
class LocalDraftEngine(DraftEngine, Protocol):
    """One that drafts in this process, when it is told to."""

    def grow(self, sessions: Sequence[Any], width: int) -> list[int]:
        """One draft step of all these: up to ``width`` frontier nodes of each are expanded.

        Returns the rows that it computed for each.
        """
        ...


class NgramEngine:
    """Prompt lookup; see ``NgramDrafter``."""

    def __init__(
        self, *, prompt_lookup_min: int, prompt_lookup_max: int, num_speculative_tokens: int
    ) -> None:
        self._settings = {
            "prompt_lookup_min": prompt_lookup_min,
            "prompt_lookup_max": prompt_lookup_max,
            "num_speculative_tokens": num_speculative_tokens,
        }
        NgramDrafter(**self._settings)

    def open(self, request: Request, stats: SpeculationStatistics) -> "NgramSession":  # noqa: ARG002
        return NgramSession(NgramDrafter(**self._settings), request.prompt_ids)

    def grow(self, sessions: "Sequence[NgramSession]", width: int) -> list[int]:  # noqa: ARG002
        """A lookup costs the same at any width, and no rows."""
        for session in sessions:
            session.grow()
        return [0] * len(sessions)


class NgramSession:
    """Drafts at once all that the text so far suggests."""

    def __init__(self, drafter: NgramDrafter, prompt_ids: IntArray) -> None:
        self._drafter = drafter
        self._text = prompt_ids
        self.tree = LivingTree(drafter.law)

    def grow(self) -> None:
        """Drafts all that there is to draft."""
        drafted = self._drafter.propose(self._text, self.tree.capacity)
        slots = np.zeros(len(drafted), np.int64)
        conditional = drafted.scores.copy()
        inner = drafted.parent_indices >= 0
        conditional[inner] /= drafted.scores[drafted.parent_indices[inner]]
        for depth in range(1, int(drafted.depths.max(initial=0)) + 1):
            level = np.flatnonzero(drafted.depths == depth)
            above = drafted.parent_indices[level]
            parents = np.where(above < 0, ROOT, slots[above])
            slots[level] = self.tree.add(parents, drafted.tokens[level], conditional[level])
        self.tree.mark_expanded(np.append(slots, ROOT))

    def proposers(self, slots: IntArray) -> dict[str, int]:
        return {"ngram": len(slots)}

    def commit(self, tokens: IntArray) -> Reroot:
        self._text = np.concatenate((self._text, tokens))
        reroot = self.tree.reroot(tokens)
        self.tree.clear()
        return reroot

    def close(self) -> None:
        self.tree.clear()


class PredictionEngine:
    """Drafts for requests that bring a prediction; see ``PredictionDrafter``. It needs not be told to."""

    def __init__(self, num_speculative_tokens: int) -> None:
        self._num_speculative_tokens = num_speculative_tokens

    def open(self, request: Request, stats: SpeculationStatistics) -> "PredictionSession":  # noqa: ARG002
        assert request.prediction_ids is not None
        return PredictionSession(PredictionDrafter(request.prediction_ids), self._num_speculative_tokens)


class PredictionSession:
    """Its tree is always all that there is to draft."""

    def __init__(self, drafter: PredictionDrafter, num_speculative_tokens: int) -> None:
        self._drafter, self._most = drafter, num_speculative_tokens
        self.tree = LivingTree(drafter.law, MAX_TREE_DEPTH)
        self._grow()

    def proposers(self, slots: IntArray) -> dict[str, int]:
        return {"prediction": len(slots)}

    def commit(self, tokens: IntArray) -> Reroot:
        self._drafter.commit(tokens)
        reroot = self.tree.reroot(tokens)
        self.tree.clear()
        self._grow()
        return reroot

    def close(self) -> None:
        self.tree.clear()

    def _grow(self) -> None:
        chain = self._drafter.propose(self._most)
        count = len(chain)
        slots = self.tree.graft(
            np.full(count, ROOT), chain.parent_indices, chain.tokens, np.full(count, self._drafter.rate)
        )
        # Expanded nodes are offered to nobody else.
        self.tree.mark_expanded(np.append(slots, ROOT))
