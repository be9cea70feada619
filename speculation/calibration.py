"""Turns a drafter's confidence into the chance of being right, online."""

import numpy as np
import numpy.typing as npt

from outrider.speculation.types import FloatArray, IntArray

NUM_RANKS = 8
"""Siblings are told apart up to this one; later ones share the last rank's counts."""

NUM_BUCKETS = 10
"""Buckets of one unit of log-odds each, from below -4 to above 4."""

LOWEST_SCORE = 1e-12
"""Corrected scores are at least this, so that products of them stay positive."""

CREDIT_PRIOR = 8.0
"""Expected hits that the belief in a text like all others is worth."""

CREDIT_MEMORY = 0.98
"""What is left of a judged position's weight after the next one. With this and the prior, the log-loss of the
demo pair's chances falls from 0.117 to 0.086 (T = 0), 0.140 to 0.136 (0.7) and 0.203 to 0.188 (1.0)."""

_EDGES = 1.0 / (1.0 + np.exp(-np.arange(-4.0, 5.0)))


class RankCalibration:
    """Corrects a drafter's conditional scores per (sibling rank, score bucket).

    A score says how likely the drafter thinks a child is the target's token given that its
    parent was accepted. Per cell this counts N offered children, their mean raw score m and
    the A accepted ones. A Beta prior centred at the raw score, worth ``prior_weight``
    offers, has the posterior mean ``(prior_weight * m + A) / (prior_weight + N)`` at m.
    Its ratio to m corrects every score of the cell, so that scores within a bucket keep
    their order, and very small ones stay small.

    A cell forgets exponentially with its own observations, not with time: a rare cell
    keeps what it knows.
    """

    def __init__(self, *, prior_weight: float = 16.0, memory: float = 1000.0) -> None:
        """
        prior_weight: offers that the raw score itself is worth.
        memory: observations of a cell after which an old one weighs 1/e.

        Raises:
            ValueError: one of them is not positive.
        """
        if not prior_weight > 0.0 or not memory > 0.0:
            raise ValueError(f"prior_weight {prior_weight} and memory {memory} must be positive")
        self._prior_weight = prior_weight
        self._memory = memory
        cells = NUM_RANKS * NUM_BUCKETS
        self._offered = np.zeros(cells)
        self._score_sum = np.zeros(cells)
        self._accepted = np.zeros(cells)
        self._factors = np.ones(cells)

    def correct(self, ranks: npt.ArrayLike, scores: npt.ArrayLike) -> FloatArray:
        """Corrected scores ``[k]``, greater than 0 and at most 1.

        ranks: int ``[k]``, 0 for the drafter's first choice below its parent.
        scores: float ``[k]`` in [0, 1], the drafter's own conditional scores.

        Raises:
            ValueError: lengths differ, a rank is negative or a score is no probability.
        """
        cells, raw = _cells(ranks, scores)
        return np.minimum(np.maximum(raw * self._factors[cells], LOWEST_SCORE), 1.0)

    def observe(self, ranks: npt.ArrayLike, scores: npt.ArrayLike, accepted: npt.ArrayLike) -> None:
        """Counts the children of accepted parents (the root is one); others teach nothing.

        ranks, scores: ``[k]``, as given to ``correct``: the raw scores.
        accepted: bool ``[k]``, whether the child was the target's token.

        Raises:
            ValueError: as for ``correct``.
        """
        cells, raw = _cells(ranks, scores)
        right = np.asarray(accepted, np.bool_)
        if right.shape != raw.shape:
            raise ValueError(f"{right.shape} outcomes for {raw.shape} scores")
        offered = self._count(cells, np.ones(len(cells)))
        keep = np.exp(-offered / self._memory)
        self._offered = self._offered * keep + offered
        self._score_sum = self._score_sum * keep + self._count(cells, raw)
        self._accepted = self._accepted * keep + self._count(cells, right.astype(np.float64))
        self._factors = self._posterior_over_prior()

    def _count(self, cells: IntArray, weights: FloatArray) -> FloatArray:
        return np.bincount(cells, weights=weights, minlength=len(self._offered)).astype(np.float64)

    def _posterior_over_prior(self) -> FloatArray:
        known = self._score_sum > 0.0
        mean = np.divide(self._score_sum, self._offered, out=np.ones_like(self._offered), where=known)
        posterior = (self._prior_weight * mean + self._accepted) / (self._prior_weight + self._offered)
        return np.where(known, posterior / mean, 1.0)


class TextCredit:
    """How much better or worse a drafter does for one text than for all.

    One text repeats itself, another is beyond the drafter. Where children's scores promised ``e``
    hits and ``h`` came, scores are worth ``(prior + h) / (prior + e)`` times what they say.
    """

    def __init__(self) -> None:
        self._hits = self._expected = 0.0

    @property
    def factor(self) -> float:
        """For conditional scores, before they are bounded by 1."""
        return (CREDIT_PRIOR + self._hits) / (CREDIT_PRIOR + self._expected)

    def observe(self, positions: int, *, hits: int, expected: float) -> None:
        """At so many positions of the text children were judged whose scores sum up to ``expected``."""
        keep = CREDIT_MEMORY**positions
        self._hits = keep * self._hits + hits
        self._expected = keep * self._expected + expected


def _cells(ranks: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[IntArray, FloatArray]:
    places = np.asarray(ranks, np.int64)
    raw = np.asarray(scores, np.float64)
    if places.shape != raw.shape or raw.ndim != 1:
        raise ValueError(f"{places.shape} ranks for {raw.shape} scores")
    if len(raw) and not (raw.min() >= 0.0 and raw.max() <= 1.0 and places.min() >= 0):
        raise ValueError(f"ranks {places} must not be negative and scores {raw} must be in [0, 1]")
    buckets = np.searchsorted(_EDGES, raw, side="right")
    return np.minimum(places, NUM_RANKS - 1) * NUM_BUCKETS + buckets, raw
