"""Seconds of a target step by number of rows, learnt while serving."""

import math

import numpy as np
import numpy.typing as npt

from outrider.speculation.types import FloatArray

DEFAULT_SECONDS = 0.05
"""Assumed time of a one-row step before anything is known."""

DEFAULT_SLOPE = 0.025
"""Assumed cost of one more row in one-row steps: bf16 on CPU, 16 rows for 1.38."""

MEMORY = 20
"""Observations of a row count over which it averages; from then on a new one weighs 1 / MEMORY."""

MAX_SURPRISE = math.log(4.0)
"""A step that took longer counts as four times the estimate: stalls are not the model's cost."""


class StepCostModel:
    """A monotone curve through observed step times.

    Per row count an exponentially weighted geometric mean, clipped upwards only (nothing
    but a stall makes a step slow, nothing makes it too fast). Noise between neighbouring
    row counts is pooled by isotonic regression (pool adjacent violators), linear in
    between. Deterministic: the same observations in the same order give the same curve.
    """

    def __init__(self, prior: npt.ArrayLike | None = None) -> None:
        """
        prior: seconds ``[R]`` for 1, 2, ... R rows, for instance from a start-up benchmark.
            None: ``DEFAULT_SECONDS * (1 + DEFAULT_SLOPE * (rows - 1))``.

        Raises:
            ValueError: the prior is empty, not positive or decreases.
        """
        self._prior = None if prior is None else np.array(prior, np.float64)
        if self._prior is not None:
            _require_curve(self._prior)
        self._means: dict[int, tuple[float, int]] = {}
        """Row count to (log seconds, observations up to MEMORY)."""

    def observe(self, rows: int, seconds: float) -> None:
        """Takes one measured step into account, O(1).

        Raises:
            ValueError: ``rows`` or ``seconds`` is not positive and finite.
        """
        if rows < 1 or not 0.0 < seconds < math.inf:
            raise ValueError(f"a step of {rows} rows cannot take {seconds} seconds")
        log_seconds = math.log(seconds)
        mean, count = self._means.get(rows, (log_seconds, 0))
        count = min(count + 1, MEMORY)
        self._means[rows] = mean + min(log_seconds - mean, MAX_SURPRISE) / count, count

    def curve(self, max_rows: int) -> FloatArray:
        """Seconds of a step with 1, 2, ... ``max_rows`` rows, never decreasing.

        Outside the observed range the prior's shape is scaled to meet the nearest
        observation; without a prior, two row counts or more give the slope above the range.

        Raises:
            ValueError: ``max_rows`` is not positive.
        """
        if max_rows < 1:
            raise ValueError(f"a curve needs at least one row, not {max_rows}")
        if not self._means:
            return self._shape(max_rows)
        knots, seconds = self._knots()
        rows = np.arange(1, max_rows + 1)
        curve = np.interp(rows, knots, seconds)
        first, last = int(knots[0]), int(knots[-1])
        shape = self._shape(max(max_rows, last))
        curve[: first - 1] = shape[: min(first - 1, max_rows)] * (seconds[0] / shape[first - 1])
        if self._prior is None and len(knots) > 1:
            slope = (seconds[-1] - seconds[0]) / (last - first)
            curve[last:] = seconds[-1] + slope * (rows[last:] - last)
        else:
            curve[last:] = shape[last:max_rows] * (seconds[-1] / shape[last - 1])
        # Where the prior is flat, scaling it may round to less than the observation beside it.
        return np.maximum.accumulate(curve)

    def _knots(self) -> tuple[FloatArray, FloatArray]:
        rows = sorted(self._means)
        means = [math.exp(self._means[count][0]) for count in rows]
        weights = [float(self._means[count][1]) for count in rows]
        return np.array(rows, np.float64), isotonic(means, weights)

    def _shape(self, max_rows: int) -> FloatArray:
        rows = np.arange(max_rows, dtype=np.float64)
        if self._prior is None:
            return DEFAULT_SECONDS * (1.0 + DEFAULT_SLOPE * rows)
        known = len(self._prior)
        slope = (
            (self._prior[-1] - self._prior[0]) / (known - 1) if known > 1 else DEFAULT_SLOPE * self._prior[0]
        )
        shape = np.empty(max_rows)
        shape[:known] = self._prior[:max_rows]
        shape[known:] = self._prior[-1] + slope * (rows[known:] - (known - 1))
        return shape


def isotonic(values: list[float], weights: list[float]) -> FloatArray:
    """Non-decreasing fit ``[n]`` with the least weighted squared error: pool adjacent violators."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        size = 1
        while pools and pools[-1][0] >= value:
            pooled, mass, count = pools.pop()
            value = (value * weight + pooled * mass) / (weight + mass)
            weight, size = weight + mass, size + count
        pools.append((value, weight, size))
    return np.repeat([value for value, _, _ in pools], [size for _, _, size in pools])


def _require_curve(seconds: FloatArray) -> None:
    rising = seconds.ndim == 1 and len(seconds) > 0 and bool((np.diff(seconds) >= 0.0).all())
    if not rising or not seconds[0] > 0.0 or not math.isfinite(seconds[-1]):
        raise ValueError(f"a prior curve must be positive and must not decrease: {seconds}")
