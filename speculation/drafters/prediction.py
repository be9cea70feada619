"""Predicted outputs: a text that the caller expects is a guess at the one that comes."""

import numpy as np

from outrider.speculation.tree import MAX_TREE_DEPTH, DraftTree, Law
from outrider.speculation.types import IntArray

MATCH = 8
"""Last tokens of the output that are compared with the prediction where its place is sought."""
LOOKAROUND = 64
"""Places that are looked at then, to either side."""
NEAR = 16
"""How far away a place is believed at which no more than the last token agrees."""
FIRST_RATE = 0.8
"""Assumed share of tokens that come as predicted, before any came."""
LEARNING_RATE = 0.125
"""Weight of one token in the running share: sixteen wrong ones silence a new prediction."""
LEAST_SCORE = 0.1
"""Nodes with a lower path score are not drafted, however little they would cost."""


class PredictionDrafter:
    """Follows the output through the prediction, and drafts what stands there next.

    While the output is as predicted, the place moves along with it. After any other token the place is
    sought again: of the ``LOOKAROUND`` nearest places right behind such a token, ahead and back, the one that
    most of the last ``MATCH`` tokens of the output lead up to, the nearest of equals. A single token is
    believed within ``NEAR``. Where no place is found, the token is taken for a replaced one, and the place
    moves on by one. It may move back, for a short match far ahead is often a wrong turn; the longer match
    then tells. Work per token is bounded: an index made once says where tokens stand.

    Scores: the running share of tokens that came as predicted, whether they were drafted or not; so a
    useless prediction is silent after some tokens, and speaks again when it has come true for some.
    """

    law = Law.DETERMINISTIC

    def __init__(self, prediction: IntArray) -> None:
        """prediction: int64 ``[length]``, from the output's first token on."""
        self._prediction = prediction
        self._tokens: list[int] = prediction.tolist()
        self._occurrences = np.argsort(prediction, kind="stable")
        """Indices by token, then ascending."""
        self._sorted = prediction[self._occurrences]
        self._last: list[int] = []
        self._place = 0
        """Index of the token that is expected next."""
        self.rate = FIRST_RATE

    def commit(self, tokens: IntArray) -> None:
        """Takes in what follows in the output, int64 ``[count]``."""
        for token in tokens.tolist():
            self._last = [*self._last[1 - MATCH :], token]
            expected = self._tokens[self._place : self._place + 1]
            if expected:
                self.rate += LEARNING_RATE * ((expected[0] == token) - self.rate)
            self._place = self._place + 1 if expected == [token] else self._behind(token)

    def propose(self, budget: int) -> DraftTree:
        """A chain of at most ``budget`` tokens, shorter where they would hardly come true."""
        scores = self.rate ** np.arange(1, min(budget, MAX_TREE_DEPTH) + 1)
        tokens = self._prediction[self._place :][: np.count_nonzero(scores >= LEAST_SCORE)]
        return DraftTree.chain(tokens, self.law, scores[: len(tokens)])

    def _behind(self, token: int) -> int:
        """The place right behind a token that was not expected."""
        start, stop = np.searchsorted(self._sorted, (token, token + 1))
        here = start + np.searchsorted(self._occurrences[start:stop], self._place)
        found = self._occurrences[max(start, here - LOOKAROUND) : min(stop, here + LOOKAROUND)]
        if len(found):
            agreed, distance = self._agreement(found), np.abs(found - self._place)
            best = np.lexsort((distance, -agreed))[0]
            if agreed[best] > 1 or distance[best] < NEAR:
                return int(found[best]) + 1
        return min(self._place + 1, len(self._tokens))

    def _agreement(self, ends: IntArray) -> IntArray:
        """How many of the last tokens stand at and right before each of these indices, int64 ``[n]``."""
        before = ends[:, None] - np.arange(len(self._last))
        same = (before >= 0) & (self._prediction[np.maximum(before, 0)] == self._last[::-1])
        count: IntArray = np.logical_and.accumulate(same, axis=1).sum(axis=1)
        return count
