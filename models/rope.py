"""Rotary position embeddings: how fast each pair of a head's dimensions turns.

Shapes: D = head_dim, always even; a position ``p`` turns pair ``i`` by ``p * frequency[i]``.

Sources: Su et al., "RoFormer" (default); position interpolation, Chen et al. (linear);
Peng et al., "YaRN", sections 3.2 to 3.4 (yarn); the Llama 3.1 model card (llama3).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.speculation.errors import UnsupportedModelError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Parameters of one model's rotary embedding.

    Raises:
        UnsupportedModelError: ``rope_type`` is not one of ``ROPE_TYPES``.
    """

    theta: float
    """Base of the wavelengths: pair i of D/2 turns by ``theta ** (-2i / D)`` radians per position."""
    rope_type: str = "default"
    factor: float = 1.0
    """By how much the context was stretched after pre-training."""
    original_max_position_embeddings: int = 0
    """Context of the pre-training, in tokens (llama3, yarn)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    """Turns in the original context up to which a pair is stretched, and from which it is kept (llama3)."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """Turns within the original context from which a pair is kept, and up to which it is stretched (yarn)."""
    truncate: bool = True
    """Whether yarn rounds the ends of its ramp to whole pairs."""
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    """Yarn's scale of cosine and sine: given directly, or by these two, or by ``factor`` alone."""

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise UnsupportedModelError(
                f"rope type {self.rope_type!r} is not supported, only {', '.join(ROPE_TYPES)}"
            )


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Radians per position ``[head_dim / 2]`` (float32) and the factor on cosine and sine.

    Everything is computed in float32 and in transformers' order of operations: an ulp of
    difference in a frequency becomes a visible angle after some ten thousand positions.
    """
    frequencies = 1.0 / _wavelengths(rope.theta, head_dim)
    match rope.rope_type:
        case "linear":
            return frequencies / rope.factor, 1.0
        case "llama3":
            return _llama3(rope, frequencies), 1.0
        case "yarn":
            return _yarn(rope, head_dim), _yarn_attention_factor(rope)
        case _:
            return frequencies, 1.0


def _wavelengths(theta: float, head_dim: int) -> Tensor:
    """Positions per radian of each pair, ``[head_dim / 2]``."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return torch.pow(theta, exponents)


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Keeps the fast pairs, stretches the slow ones, and blends those between by their turns."""
    context = rope.original_max_position_embeddings
    positions_per_turn = 2 * math.pi / frequencies
    kept_share = (context / positions_per_turn - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - kept_share) * frequencies / rope.factor + kept_share * frequencies
    is_slow = positions_per_turn > context / rope.low_freq_factor
    is_fast = positions_per_turn < context / rope.high_freq_factor
    return torch.where(is_slow, frequencies / rope.factor, torch.where(is_fast, frequencies, blended))


def _yarn(rope: RopeConfig, head_dim: int) -> Tensor:
    """Blends kept and stretched frequencies along a ramp over the pairs' indices."""
    wavelengths = _wavelengths(rope.theta, head_dim)
    start, end = _yarn_ramp(rope, head_dim)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - start) / (end - start)
    kept_share = 1 - ramp.clamp(0, 1)
    return 1.0 / (rope.factor * wavelengths) * (1 - kept_share) + 1.0 / wavelengths * kept_share


def _yarn_ramp(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """Pair indices at which stretching begins and at which it is complete."""
    start = _pair_with_turns(rope.beta_fast, rope, head_dim)
    end = _pair_with_turns(rope.beta_slow, rope, head_dim)
    if rope.truncate:
        start, end = math.floor(start), math.ceil(end)
    start, end = max(start, 0), min(end, head_dim - 1)
    return start, end if end != start else end + 0.001


def _pair_with_turns(turns: float, rope: RopeConfig, head_dim: int) -> float:
    """Index of the pair that turns ``turns`` times within the original context, as a real number."""
    positions_per_radian = rope.original_max_position_embeddings / (turns * 2 * math.pi)
    return head_dim * math.log(positions_per_radian) / (2 * math.log(rope.theta))


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _magnitude(rope.factor, rope.mscale) / _magnitude(rope.factor, rope.mscale_all_dim)
    return _magnitude(rope.factor, 1.0)


def _magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
