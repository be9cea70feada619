"""Cutting distributions short: ``min_p``, ``top_k`` and ``top_p``, deterministic at ties.

Shapes: R rows, V vocabulary. Logits are float ``[R, V]``, masked with -inf in place; NaN
stays NaN, so that whoever chooses from the row notices.
"""

import math

import numpy as np
import torch

_NUCLEUS_GUESS = 64
"""Tokens that top_p looks at before it sorts the whole vocabulary."""


def keep_near_top(logits: torch.Tensor, min_p: float) -> None:
    """Masks tokens less probable than ``min_p`` (within (0, 1]) times the most probable one."""
    floor = logits.amax(dim=1, keepdim=True) + math.log(min_p)
    logits.masked_fill_(logits < floor, -torch.inf)


def keep_top(logits: torch.Tensor, top_k: int, top_p: float) -> None:
    """Masks all but the most probable tokens of each row; at least one stays.

    top_k: how many stay, or all if below 1.
    top_p: of these, renormalised, the shortest run in descending order stays whose mass
        is this or more. In either, equals go in the order of their ids.
    """
    vocab_size = logits.shape[1]
    limited = 0 < top_k < vocab_size
    width = top_k if limited else min(vocab_size, _NUCLEUS_GUESS)
    values = logits.topk(width, dim=1).values
    if top_p >= 1:
        if limited:
            _keep_largest(logits, values[:, -1:], torch.full_like(values[:, :1], width, dtype=torch.int64))
        return
    total = None if limited or width == vocab_size else _mass(logits).sum(dim=1, keepdim=True)
    sizes, short = _nucleus(values, top_p, total)
    cut = values.gather(1, sizes - 1)
    if short is not None and bool(short.any()):
        sorted_rows = _descending(logits[short])
        sizes[short], _ = _nucleus(sorted_rows, top_p, None)
        cut[short] = sorted_rows.gather(1, sizes[short] - 1)
    _keep_largest(logits, cut, sizes)


def _nucleus(
    values: torch.Tensor, top_p: float, total: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """How many of the leading ``values`` hold ``top_p`` of the mass.

    values: ``[R, width]``, descending.
    total: ``[R, 1]``, the mass of all tokens, or None if ``values`` are all.

    Returns:
        int64 ``[R, 1]`` within [1, width], and bool ``[R]``, whether ``width`` was too
        short (None if ``values`` are all).
    """
    mass = _mass(values).cumsum(dim=1)
    wanted = top_p * (mass[:, -1:] if total is None else total)
    sizes = (mass < wanted).sum(dim=1, keepdim=True) + 1
    short = None if total is None else (sizes > values.shape[1])[:, 0]
    return sizes.clamp(max=values.shape[1]), short


def _descending(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` without NaN, sorted."""
    if rows.device.type == "cpu":
        # Torch sorts indices along, and takes thirty times as long.
        return torch.from_numpy(np.sort(rows.numpy(), axis=1)).flip(1)
    return rows.sort(dim=1, descending=True).values


def _mass(values: torch.Tensor) -> torch.Tensor:
    """float64 ``[R, width]``: probabilities up to one factor per row."""
    # In float64, sums in different orders agree far beyond float32's precision.
    return (values - values.amax(dim=1, keepdim=True)).exp_().double()


def _keep_largest(logits: torch.Tensor, cut: torch.Tensor, sizes: torch.Tensor) -> None:
    """Masks all but the ``sizes`` largest of each row, of equals the lowest ids.

    cut: ``[R, 1]``, the least logit that stays. sizes: int64 ``[R, 1]``.
    """
    dropped = logits < cut
    surplus = logits.shape[1] - dropped.sum(dim=1, keepdim=True) - sizes
    if bool((surplus > 0).any()):
        equal = logits == cut
        dropped |= equal & (equal.cumsum(dim=1) > equal.sum(dim=1, keepdim=True) - surplus)
    logits.masked_fill_(dropped, -torch.inf)
