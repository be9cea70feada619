"""What a drafter guesses: the likeliest tokens of its distribution, in the order of the target's own noise.

On CPU one native call (``native/guesses.hpp``); otherwise PyTorch's operators, which are the reference.

Shapes: R rows, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.gumbel import exponential_noise, position_keys
from outrider.kernels.native import library

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """The noise of R rows.

    states: uint64 ``[R]``, see ``request_states``. positions: int64 ``[R]``. noisy: bool ``[R]``;
        the others have none.
    """

    states: npt.NDArray[np.uint64]
    positions: IntArray
    noisy: npt.NDArray[np.bool_]


def guesses(logits: torch.Tensor, streams: Streams, count: int) -> tuple[IntArray, FloatArray]:
    """Of every row the ``count`` tokens with the largest ``p / E``, p alone without noise, the largest first.

    logits: float ``[R, V]``, each row in one piece.

    Returns:
        Tokens and their shares of the sum over all tokens, ``[R, min(count, V)]``. Where a row holds a NaN
        or infinity, or nothing but -inf, shares are 0.
    """
    native = library.layers(logits)
    count = min(count, logits.shape[1])
    if native is None:
        return guesses_reference(logits, streams, count)
    if logits.stride(1) != 1 or len(logits) != len(streams.positions):
        raise ValueError(
            f"logits {tuple(logits.shape)} in steps of {logits.stride()} for {len(streams.positions)} rows"
        )
    found: tuple[IntArray, FloatArray] = native.guess(
        library.KINDS[logits.dtype],
        logits.data_ptr(),
        logits.stride(0),
        logits.shape[1],
        count,
        streams.states,
        streams.positions,
        streams.noisy,
    )
    return found


def guesses_reference(logits: torch.Tensor, streams: Streams, count: int) -> tuple[IntArray, FloatArray]:
    """What ``guesses`` computes, by PyTorch, on any device."""
    scores = perturbed(logits, streams)
    best, tokens = scores.topk(count, dim=1)
    shares = (best / scores.sum(dim=1, keepdim=True)).nan_to_num_(nan=0.0).clamp_(0.0, 1.0)
    return tokens.cpu().numpy(), shares.to(torch.float64).cpu().numpy()


def perturbed(logits: torch.Tensor, streams: Streams) -> torch.Tensor:
    """``p / E`` of all tokens, p alone without noise: ``[R, V]`` float32 or better. NaN gives NaN."""
    scores = logits.softmax(dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
    rows = streams.noisy.nonzero()[0]
    if len(rows):
        keys = torch.from_numpy(position_keys(streams.states[rows], streams.positions[rows])).to(
            logits.device
        )
        noise = exponential_noise(keys[0], keys[1], logits.shape[1])
        if len(rows) == len(scores):
            scores.div_(noise)
        else:
            scores[torch.from_numpy(rows).to(logits.device)] /= noise
    return scores
