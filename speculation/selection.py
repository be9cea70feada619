"""How many nodes to verify.

The question is for the most expected tokens per second of target steps. With path scores
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


def best_together(path_scores: FloatArray, step_seconds: FloatArray, batch: int) -> float:
    """Tokens per second of a batch that verifies the best number of all these nodes.

    path_scores: ``[n]``, in any order. step_seconds: ``[R]``, of a step with 0, 1, ... R - 1 nodes.
    """
    best = -np.sort(-path_scores)[: len(step_seconds) - 1]
    tokens = batch + np.concatenate((np.zeros(1), np.cumsum(best)))
    return float((tokens / step_seconds[: len(tokens)]).max())


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
