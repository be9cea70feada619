"""Prompt lookup: what followed the last time is a guess at what follows now."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from outrider.speculation.errors import InvalidConfigError
from outrider.speculation.tree import MAX_TREE_DEPTH, ROOT, DraftTree, Law
from outrider.speculation.types import FloatArray, IntArray

LOOKBACK = 64
"""Occurrences that one proposal looks at when it wants different continuations."""

_PRIME = (1 << 61) - 1
_BASE = 0x1F3D5B79A6C8E024


class NgramDrafter:
    """vLLM's ``ngram``, prompt lookup decoding.

    The longest suffix of ``prompt_lookup_max`` down to ``prompt_lookup_min`` tokens that
    occurred before is looked up, and the tokens after its most recent earlier occurrence
    are drafted. With ``branches`` > 1 the different continuations of up to that many most
    recent occurrences are merged into a trie, in order of recency.

    Scores: a match of n tokens is taken to be right with chance ``1 - 2**-n``, and a token
    accepted on the way lengthens the match by one. Where an older continuation leaves the
    newer ones, its chance is halved per continuation before it. All are in (0, 1].
    """

    law = Law.DETERMINISTIC

    def __init__(
        self,
        *,
        prompt_lookup_min: int = 2,
        prompt_lookup_max: int = 4,
        num_speculative_tokens: int = 5,
        branches: int = 1,
    ) -> None:
        """
        Raises:
            InvalidConfigError: a number is out of range, or the minimum exceeds the maximum.
        """
        if not 1 <= prompt_lookup_min <= prompt_lookup_max:
            raise InvalidConfigError(
                f"prompt_lookup_min {prompt_lookup_min} must be at least 1 and "
                f"at most prompt_lookup_max {prompt_lookup_max}"
            )
        if not 1 <= num_speculative_tokens <= MAX_TREE_DEPTH:
            raise InvalidConfigError(
                f"num_speculative_tokens {num_speculative_tokens} is not between 1 and {MAX_TREE_DEPTH}"
            )
        if branches < 1:
            raise InvalidConfigError(f"branches {branches} is not positive")
        self._lengths = range(prompt_lookup_max, prompt_lookup_min - 1, -1)
        self._num_speculative_tokens = num_speculative_tokens
        self._branches = branches
        self._index = _SuffixIndex(self._lengths)

    def propose(self, committed: IntArray, budget: int) -> DraftTree:
        """See ``Drafter.propose``. O(new tokens) Python work when ``committed`` extends the last one.

        Telling whether it does is one vectorised comparison (some microseconds per 10,000
        tokens); if it does not, the index is built anew.
        """
        if not self._index.extend(committed):
            self._index = _SuffixIndex(self._lengths)
            self._index.extend(committed)
        depth = min(self._num_speculative_tokens, budget)
        if depth < 1:
            return DraftTree.empty(self.law)
        matched, ends = self._index.occurrences()
        trie = _Trie(budget, matched)
        for end in ends:
            trie.merge(committed[end : end + depth].tolist())
            if trie.branches == self._branches or trie.full:
                break
        return trie.tree(self.law)


class _SuffixIndex:
    """Where each n-gram of a growing text ended, by rolling hash, O(lengths) per new token.

    A collision (2**-61) yields a bad guess, which verification refuses.
    """

    def __init__(self, lengths: range) -> None:
        self._lengths = lengths
        self._powers = {n: pow(_BASE, n, _PRIME) for n in lengths}
        self._last: dict[int, dict[int, int]] = {n: {} for n in lengths}
        self._previous: dict[int, list[int]] = {n: [0] for n in lengths}
        self._prefix = [0]
        self._seen = np.zeros(256, np.int64)

    def extend(self, text: IntArray) -> bool:
        """Takes in what ``text`` has beyond the text so far; False if it does not continue it."""
        known = len(self._prefix) - 1
        if len(text) < known or not np.array_equal(text[:known], self._seen[:known]):
            return False
        self._remember(text, known)
        for position, token in enumerate(text[known:].tolist(), start=known):
            # Only now, as its last tokens stop being a suffix, do they count as earlier ones.
            self._record(position)
            self._prefix.append((self._prefix[-1] * _BASE + token + 1) % _PRIME)
        return True

    def occurrences(self) -> tuple[int, Iterator[int]]:
        """The matched length (0: none), and where that suffix ended before, most recent first."""
        length = len(self._prefix) - 1
        for n in self._lengths:
            end = self._last[n].get(self._hash(n, length), 0) if n <= length else 0
            if end:
                return n, self._walk_back(n, end)
        return 0, iter(())

    def _walk_back(self, n: int, end: int) -> Iterator[int]:
        for _ in range(LOOKBACK):
            if not end:
                return
            yield end
            end = self._previous[n][end]

    def _record(self, end: int) -> None:
        if not end:
            return
        for n in self._lengths:
            before = 0
            if n <= end:
                key = self._hash(n, end)
                before = self._last[n].get(key, 0)
                self._last[n][key] = end
            self._previous[n].append(before)

    def _hash(self, n: int, end: int) -> int:
        return (self._prefix[end] - self._prefix[end - n] * self._powers[n]) % _PRIME

    def _remember(self, text: IntArray, known: int) -> None:
        if len(text) > len(self._seen):
            grown = np.zeros(2 * len(text), np.int64)
            grown[:known] = self._seen[:known]
            self._seen = grown
        self._seen[known : len(text)] = text[known:]


class _Trie:
    """Continuations merged in order of preference."""

    def __init__(self, budget: int, matched: int) -> None:
        self._budget = budget
        self._matched = matched
        self._children: dict[tuple[int, int], int] = {}
        self._scores: list[float] = []
        self.branches = 0

    @property
    def full(self) -> bool:
        return len(self._scores) == self._budget

    def merge(self, continuation: list[int]) -> None:
        """Adds a path as far as there is room; counts it if it had anything new."""
        node, score, before = ROOT, 1.0, len(self._scores)
        for depth, token in enumerate(continuation):
            child = self._children.get((node, token))
            if child is None:
                if self.full:
                    break
                leaves = 0.5**self.branches if len(self._scores) == before else 1.0
                child = len(self._scores)
                self._children[node, token] = child
                self._scores.append(score * leaves * (1.0 - 0.5 ** (self._matched + depth)))
            node, score = child, self._scores[child]
        self.branches += len(self._scores) > before

    def tree(self, law: Law) -> DraftTree:
        paths: npt.NDArray[np.int64] = np.array(list(self._children), np.int64).reshape(-1, 2)
        scores: FloatArray = np.array(self._scores, np.float64)
        return DraftTree(tokens=paths[:, 1], parent_indices=paths[:, 0], scores=scores, law=law)
