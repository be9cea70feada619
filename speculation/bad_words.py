"""``bad_words``: texts that must not come up in the output, as sequences of tokens.

The last token of a sequence is out wherever the others stand before it, in the output and on a node's
path below it; a sequence of one token is always out. As in vLLM, the prompt does not count.
"""

from collections.abc import Sequence

import numpy as np
import torch

from outrider.speculation.tree import ROOT, DraftTree
from outrider.speculation.types import IntArray

_NONE = -1
"""In place of a token before the first one of the output."""


class BadWords:
    """One request's. words: token ids, each at least one; device: where the logits are."""

    def __init__(self, words: Sequence[Sequence[int]], device: torch.device | str) -> None:
        always = sorted({word[0] for word in words if len(word) == 1})
        self._always = torch.tensor(always, dtype=torch.int64, device=device)
        self._longer: dict[int, list[tuple[IntArray, int]]] = {}
        """Tokens before the last one, and that one, by the one right before it: a step looks at few."""
        for word in words:
            if len(word) > 1:
                ending = np.array(word[:-1], np.int64), word[-1]
                self._longer.setdefault(word[-2], []).append(ending)
        self._reach = max((len(word) - 1 for word in words), default=0)
        self._tail = np.full(self._reach, _NONE)

    @property
    def depends_on_path(self) -> bool:
        """Whether it matters what stands before a token."""
        return bool(self._longer)

    def commit(self, tokens: IntArray) -> None:
        """Output tokens were committed, int64 ``[k]``."""
        if self._reach:
            self._tail = np.concatenate((self._tail, tokens))[-self._reach :]

    def apply(self, logits: torch.Tensor, tree: DraftTree, rows: IntArray) -> None:
        """Takes what may not come next out of logits ``[R, V]`` of the tree's ``rows``, in place."""
        logits[:, self._always] = -torch.inf
        if not self._longer:
            return
        before = self._before(tree)[rows]
        for token in np.unique(before[:, -1]).tolist():
            for word, last in self._longer.get(token, ()):
                ends = (before[:, self._reach - len(word) :] == word).all(axis=1)
                if ends.any():
                    logits[torch.from_numpy(ends.nonzero()[0]).to(logits.device), last] = -torch.inf

    def _before(self, tree: DraftTree) -> IntArray:
        """The last tokens up to the root and to each node, int64 ``[nodes + 1, reach]``."""
        columns = np.arange(self._reach)
        # Above the root the output goes on.
        found: IntArray = self._tail[np.minimum(columns + tree.row_depths[:, None], self._reach - 1)]
        nodes = np.arange(len(tree))
        for back in range(min(self._reach, int(tree.depths.max(initial=0)))):
            on_path = nodes != ROOT
            found[1:, -1 - back][on_path] = tree.tokens[nodes[on_path]]
            nodes = np.where(on_path, tree.parent_indices[nodes], ROOT)
        return found
