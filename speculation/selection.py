"""How many nodes to verify, and whether to let the drafter grow once more first.

Both questions maximise expected tokens per second of one target step. With path scores
``s`` (best first), a step over the n best nodes yields ``1 + s_1 + ... + s_n`` tokens on
average (OPT-Tree, Wang et al.; the 1 is the target's own token).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from outrider.speculation.types import FloatArray


def best_budget(
    path_scores_desc: npt.ArrayLike, step_seconds: npt.ArrayLike, draft_seconds: float = 0.0
) -> int:
    """How many of the best nodes to verify; zero is plain decoding.

    The n, at most R - 1, that maximises ``rates(...)[n]``; the smallest such n on ties.
    Arguments and errors as for ``rates``.
    """
    return int(rates(path_scores_desc, step_seconds, draft_seconds).argmax())


def share_budget(
    path_scores_desc: Sequence[FloatArray], step_seconds: npt.ArrayLike, other_rows: int = 0
) -> list[int]:
    """How many nodes of each request of a batch to verify in one step, zero allowed.

    path_scores_desc: per request ``[n_i]``, best first. step_seconds: as for ``rates``; a step
    takes at most R rows, one of which each request has anyway. other_rows: taken by something else.

    With B requests, the best n nodes of all together yield ``B + s_1 + ... + s_n`` tokens in
    ``step_seconds(other_rows + B + n)``; the n with the highest rate is taken. Rows go where they
    gain most.

    Raises:
        ValueError: there are more requests than rows.
    """
    seconds = np.asarray(step_seconds, np.float64)
    batch = len(path_scores_desc)
    base = batch + other_rows
    if base > len(seconds):
        raise ValueError(f"{batch} requests and {other_rows} other rows do not fit {len(seconds)} rows")
    everything = np.concatenate(path_scores_desc)
    order = np.argsort(-everything, kind="stable")[: len(seconds) - base]
    tokens = batch + np.concatenate((np.zeros(1), np.cumsum(everything[order])))
    count = int((tokens / seconds[base - 1 : base + len(order)]).argmax())
    owners = np.repeat(np.arange(batch), [len(scores) for scores in path_scores_desc])
    shares: list[int] = np.bincount(owners[order[:count]], minlength=batch).tolist()
    return shares


def best_rate(
    path_scores_desc: npt.ArrayLike, step_seconds: npt.ArrayLike, draft_seconds: float = 0.0
) -> float:
    """Expected tokens per second with the best budget; arguments and errors as for ``rates``."""
    return float(rates(path_scores_desc, step_seconds, draft_seconds).max())


def rates(
    path_scores_desc: npt.ArrayLike, step_seconds: npt.ArrayLike, draft_seconds: float = 0.0
) -> FloatArray:
    """Expected tokens per second by number of verified nodes, float64 ``[min(n, R - 1) + 1]``.

    path_scores_desc: ``[n]``, path scores of the nodes at hand, best first.
    step_seconds: ``[R]``, seconds of a target step with 1, 2, ... R rows.
    draft_seconds: already spent on drafting for this step.

    Entry n is ``(1 + s_1 + ... + s_n) / (draft_seconds + step_seconds(1 + n))``.

    Raises:
        ValueError: there are no step times, a duration is not positive (the drafter's may
            be zero), or scores are not in descending order.
    """
    scores = np.asarray(path_scores_desc, np.float64)
    seconds = np.asarray(step_seconds, np.float64)
    if not len(seconds) or not seconds.min() > 0.0:
        raise ValueError(f"step times must be positive and at least one: {seconds}")
    if not draft_seconds >= 0.0:
        raise ValueError(f"draft_seconds is {draft_seconds}, less than zero")
    scores = scores[: len(seconds) - 1]
    if (scores[1:] > scores[:-1]).any():
        raise ValueError(f"path scores are not in descending order: {scores}")
    tokens = np.ones(len(scores) + 1)
    tokens[1:] += np.cumsum(scores)
    return tokens / (draft_seconds + seconds[: len(tokens)])


def worth_growing(
    expanded_scores: npt.ArrayLike,
    child_hit_probability: npt.ArrayLike,
    growth_seconds: float,
    current_rate: float,
    *,
    patience: float = 1.0,
) -> bool:
    """Whether one more draft step pays while the target waits for it.

    expanded_scores: ``[w]``, path scores of the nodes that the step would expand.
    child_hit_probability: scalar or ``[w]``, chance that one of a node's new children is
        the target's token, given that the node is accepted.
    growth_seconds: the draft step, plus what its nodes add to the target's step.
    current_rate: tokens per second without the step, see ``best_rate``.
    patience: more than 1 waits less: what the drafter would grow anyway
        during the target's step is then worth more than waiting. Infinite: never wait.

    The step is expected to gain ``g = Σ score_i * hit_i`` tokens in ``t`` seconds. It raises
    the rate E/T, because (E + g) / (T + t) > E / T, exactly when ``g / t > E / T``; the rule
    is ``g > patience * current_rate * t``.

    Raises:
        ValueError: the time, the rate or the patience is negative or not a number.
    """
    for name, value in (("growth_seconds", growth_seconds), ("rate", current_rate), ("patience", patience)):
        if not value >= 0.0:
            raise ValueError(f"{name} is {value}, not a non-negative number")
    hits = np.asarray(child_hit_probability, np.float64)
    gain = float((np.asarray(expanded_scores, np.float64) * hits).sum())
    # Not multiplied when free: an infinite patience times nothing is not a number.
    price = current_rate * growth_seconds
    return gain > (patience * price if price else 0.0)
