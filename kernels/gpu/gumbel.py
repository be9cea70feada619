"""Counter-based noise and the exponential race, without noise in memory.

The same bits as ``outrider.kernels.gumbel``. There the noise is ``-log1p(-u)`` in float64; here it is
``-log(1 - u)``, which is the same number: u is an odd multiple of 2**-33, so the difference is exact.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 1024
"""Tokens of one program."""

# Triton's compiler reads literals as signed.
_MULTIPLIER_1: tl.constexpr = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64)
_MULTIPLIER_2: tl.constexpr = tl.constexpr(0x94D049BB133111EB - 2**64)


def exponential_noise(base: torch.Tensor, gamma: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Unit exponentials for every token, each row from its own stream.

    base, gamma: int64 ``[R]``, the rows of ``stream_keys``.

    Returns:
        float32 ``[R, V]`` within [2**-33, 33 ln 2], computed in float64 and then rounded.
    """
    noise = torch.empty(len(base), vocab_size, device=base.device)
    grid = (len(base), triton.cdiv(vocab_size, _BLOCK))
    _write_noise[grid](base, gamma, noise, vocab_size, BLOCK=_BLOCK)
    return noise


def draw(probs: torch.Tensor, base: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """The winner int64 ``[R]`` of each row's race; see ``outrider.kernels.gumbel.draw``.

    probs: float ``[R, V]``, contiguous. base, gamma: int64 ``[R]``.
    """
    R, V = probs.shape
    blocks = triton.cdiv(V, _BLOCK)
    times = probs.new_empty(R, blocks, dtype=torch.promote_types(probs.dtype, torch.float32))
    tokens = torch.empty(R, blocks, dtype=torch.int64, device=probs.device)
    winners = tokens.new_empty(R)
    _race[(R, blocks)](probs, base, gamma, times, tokens, V, BLOCK=_BLOCK)
    _earliest[(R,)](times, tokens, winners, blocks, WIDTH=triton.next_power_of_2(blocks))
    return winners


@triton.jit
def noise_words(base: tl.tensor, gamma: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """The 32 bits of each token's noise, as a signed number in int64."""
    # The counter: int64 multiplication wraps around, as the stream wants.
    z = tokens.to(tl.int64) * gamma + base
    # An arithmetic shift and a mask make a logical shift.
    z ^= (z >> 30) & ((1 << 34) - 1)
    z *= _MULTIPLIER_1
    z ^= (z >> 27) & ((1 << 37) - 1)
    z *= _MULTIPLIER_2
    return z >> 32


@triton.jit
def _noise(base: tl.tensor, gamma: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """float32 unit exponentials of the row's tokens."""
    words = noise_words(base, gamma, tokens).to(tl.float64)
    # 1 - u, where u = (words + 2**31 + 1/2) / 2**32.
    rest = (0.5 - 2.0**-33) - words * 2.0**-32
    return (-tl.log(rest)).to(tl.float32)


@triton.jit
def _write_noise(
    base: tl.tensor, gamma: tl.tensor, noise: tl.tensor, vocab_size: int, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    numbers = _noise(tl.load(base + row), tl.load(gamma + row), tokens)
    tl.store(noise + row.to(tl.int64) * vocab_size + tokens, numbers, mask=tokens < vocab_size)


@triton.jit
def _race(
    probs: tl.tensor,
    base: tl.tensor,
    gamma: tl.tensor,
    times: tl.tensor,
    winners: tl.tensor,
    vocab_size: int,
    BLOCK: tl.constexpr,
) -> None:
    """The winner of one block of a row's tokens."""
    row, block = tl.program_id(0), tl.program_id(1)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    real = tokens < vocab_size
    wide: tl.constexpr = times.dtype.element_ty
    chances = tl.load(probs + row.to(tl.int64) * vocab_size + tokens, mask=real, other=0.0).to(wide)
    noise = _noise(tl.load(base + row), tl.load(gamma + row), tokens).to(wide)
    arrivals = tl.div_rn(noise, chances) if wide == tl.float32 else noise / chances
    # A NaN is earlier than anything. What lies behind the vocabulary has no chance, and the
    # highest ids, so that it loses every tie.
    arrivals = tl.where(arrivals != arrivals, -float("inf"), arrivals)
    at = row * tl.num_programs(1) + block
    _store_earliest(arrivals, tokens, times + at, winners + at)


@triton.jit
def _earliest(
    times: tl.tensor, tokens: tl.tensor, winners: tl.tensor, blocks: int, WIDTH: tl.constexpr
) -> None:
    """The winner of a row's blocks."""
    row = tl.program_id(0)
    block = tl.arange(0, WIDTH)
    at = row * blocks + block
    arrivals = tl.load(times + at, mask=block < blocks, other=float("inf"))
    candidates = tl.load(tokens + at, mask=block < blocks, other=2147483647)
    tl.store(winners + row, tl.min(tl.where(arrivals == tl.min(arrivals), candidates, 2147483647)))


@triton.jit
def _store_earliest(arrivals: tl.tensor, tokens: tl.tensor, time: tl.tensor, winner: tl.tensor) -> None:
    earliest = tl.min(arrivals)
    tl.store(time, earliest)
    tl.store(winner, tl.min(tl.where(arrivals == earliest, tokens, 2147483647)))
