"""What is said of a measurement: paired ratios with intervals, and how much texts repeat themselves."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
REPEATED_TOKENS = 8


def median_ratio(numerator: Sequence[float], denominator: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Median of the paired ratios with a 95 % bootstrap interval."""
    ratios = np.array(numerator) / np.array(denominator)
    rng = np.random.default_rng(seed)
    resampled = np.median(rng.choice(ratios, (RESAMPLES, len(ratios))), axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {
        "median": round(float(np.median(ratios)), 3),
        "low": round(float(low), 3),
        "high": round(float(high), 3),
        "pairs": len(ratios),
    }


def repeated_share(tokens: Sequence[int], size: int = REPEATED_TOKENS) -> float:
    """Share of a text's runs of ``size`` tokens that it has had before; 0.0 for a shorter text."""
    runs = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
