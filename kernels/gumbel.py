"""Counter-based noise and the exponential race: Triton's kernels on devices, a native one or PyTorch on CPU.

``argmin(E / p)`` with independent unit exponentials E is an exact draw from p, the same
one as ``argmax(log p + gumbel)`` with ``gumbel = -log E`` (Maddison, Tarlow and Minka,
"A* Sampling", 2014, section 2), but keeps full precision where p is small. Every bit of
the noise is a function of (seed, choice, position, token) alone, so whoever knows the
seed can compute it, in any order and in any batch.

The bits are those of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
number generators", 2014), one stream with its own odd increment per (seed, choice,
position), indexed by the token; the multipliers are David Stafford's "Mix13".

Shapes: R rows, V vocabulary.
"""

from functools import cache
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.native import library

_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_GOLDEN = 0x9E3779B97F4A7C15
_BRANCHES = np.array([[0xD1B54A32D192ED03], [0x8CB92BA72F3D8DD7]], np.uint64)
"""``[2, 1]``: tell base and gamma apart."""

_BLOCK = 2**17
"""Tokens worked on at once on a CPU, so that the scratch stays in its caches."""

IntLike = int | npt.NDArray[np.int64] | npt.NDArray[np.uint64]


def request_states(seeds: IntLike, choices: IntLike) -> npt.NDArray[np.uint64]:
    """What all positions of a request share, to be computed once.

    seeds: any of the 2**64 values; int64 is read modulo 2**64.
    choices: which of a request's ``n`` choices.

    Returns:
        uint64, of the arguments' common shape, at least ``[1]``.
    """
    return _absorb(_absorb(np.full(1, _GOLDEN, np.uint64), seeds), choices)


def position_keys(states: npt.NDArray[np.uint64], positions: IntLike) -> npt.NDArray[np.int64]:
    """The keys of one noise stream per row.

    states: uint64 ``[R]`` or ``[1]``, of ``request_states``.
    positions: ``[R]``, index in the whole sequence of the token to choose.

    Returns:
        int64 ``[2, R]``: the bases and the (odd) gammas that ``exponential_noise`` takes.
    """
    keys = _finalise(_absorb(states, positions) ^ _BRANCHES)
    keys[1] |= np.uint64(1)
    return keys.view(np.int64)


def stream_keys(seeds: IntLike, positions: IntLike, choices: IntLike) -> npt.NDArray[np.int64]:
    """``position_keys`` from scratch, int64 ``[2, R]``; each argument is ``[R]`` or one for all."""
    return position_keys(request_states(seeds, choices), positions)


def exponential_noise(base: torch.Tensor, gamma: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Unit exponentials for every token, each row from its own stream.

    base, gamma: int64 ``[R]``, the rows of ``stream_keys``.

    Returns:
        float32 ``[R, V]`` within [2**-33, 33 ln 2]: ``-log1p(-u)``, where u is the middle
        of one of 2**32 equal intervals. Computed in float64 and then rounded, so that the
        last ulp of a library's logarithm does not show.
    """
    if on_device(base):
        noise: torch.Tensor = _kernels().exponential_noise(base, gamma, vocab_size)
        return noise
    rows = len(base)
    noise = torch.empty(rows, vocab_size)
    step = max(1, _BLOCK // vocab_size)
    for start in range(0, rows, step):
        block = slice(start, start + step)
        # Rounds to float32.
        noise[block] = _minus_exponentials(base[block], gamma[block], vocab_size)
    return noise.neg_()


def exponential_race(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The winner of each row's race, an exact draw from ``probs``.

    probs: float ``[R, V]``, not negative, of any positive sum (the sum changes no winner).
    noise: float32 ``[R, V]`` from ``exponential_noise``.

    Returns:
        int64 ``[R]``, the least ``noise / probs``, of equal ones the lowest id. A token of
        probability 0 never wins against another; a NaN wins always, so the caller sees it.
    """
    return first_largest(torch.div(noise, probs).neg_())


def first_largest(values: torch.Tensor) -> torch.Tensor:
    """The index int64 ``[R]`` of each row's largest value, of equal ones the first; a NaN is larger."""
    if values.device.type == "cpu":
        # Several times as fast as PyTorch's, which does not use vector registers.
        return torch.from_numpy(values.numpy().argmax(axis=-1))
    return values.argmax(dim=-1)


def draw(
    probs: torch.Tensor, base: torch.Tensor, gamma: torch.Tensor, streams: torch.Tensor | None = None
) -> torch.Tensor:
    """The winner int64 ``[R]`` of each row's race against the noise of its stream.

    probs: float ``[R, V]``, as for ``exponential_race``. base, gamma: int64 ``[S]``, as for
    ``exponential_noise``. streams: int64 ``[R]``, which of these is each row's; None: each has its own.
    """
    if on_device(probs):
        # Nothing is gained there by making the noise of rows that share a stream once.
        keys = (base, gamma) if streams is None else (base[streams], gamma[streams])
        winners: torch.Tensor = _kernels().draw(probs, *keys)
        return winners
    native = library.layers(probs) if probs.dtype is torch.float32 else None
    if native is not None:
        values = probs.contiguous()
        found: npt.NDArray[np.int64] = native.draw(
            values.data_ptr(),
            values.shape[1],
            torch.get_num_threads(),
            base.numpy(),
            gamma.numpy(),
            np.arange(len(values)) if streams is None else streams.numpy(),
        )
        return torch.from_numpy(found)
    return draw_reference(probs, base, gamma, streams)


def draw_reference(
    probs: torch.Tensor, base: torch.Tensor, gamma: torch.Tensor, streams: torch.Tensor | None = None
) -> torch.Tensor:
    """What ``draw`` computes, by PyTorch."""
    noise = exponential_noise(base, gamma, probs.shape[1])
    return exponential_race(probs, noise if streams is None else noise[streams])


def on_device(x: torch.Tensor) -> bool:
    """Whether Triton's kernels work on this."""
    return not x.is_cpu


@cache
def _kernels() -> ModuleType:
    from outrider.kernels.gpu import gumbel

    return gumbel


def _minus_exponentials(base: torch.Tensor, gamma: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """float64 ``[R, V]``: ``log1p(-u)``."""
    # The counter: int64 multiplication wraps around, as the stream wants.
    z = torch.arange(vocab_size, device=base.device) * gamma[:, None]
    z += base[:, None]
    # An arithmetic shift and a mask make a logical shift.
    z ^= (z >> 30) & (2**34 - 1)
    z *= _signed(_MULTIPLIER_1)
    z ^= (z >> 27) & (2**37 - 1)
    z *= _signed(_MULTIPLIER_2)
    # SplitMix64's last xor-shift, by 31, would touch but one of the top 32 bits. They are
    # read as a signed number, which is the unsigned one less 2**31 with its top bit flipped.
    z >>= 32
    return z.to(torch.float64).mul_(-(2.0**-32)).sub_(0.5 + 2.0**-33).log1p_()


def _absorb(state: npt.NDArray[np.uint64], word: IntLike) -> npt.NDArray[np.uint64]:
    """Mixes ``word`` into ``state``: one-to-one in either, so no two positions share a stream."""
    words = np.atleast_1d(np.asarray(word)).astype(np.uint64)
    mixed: npt.NDArray[np.uint64] = _finalise(_finalise(words + np.uint64(_GOLDEN)) ^ state)
    return mixed + np.uint64(_GOLDEN)


def _finalise(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser, a permutation of the 64-bit words."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(_MULTIPLIER_1)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(_MULTIPLIER_2)
    return words ^ (words >> np.uint64(31))


def _signed(word: int) -> int:
    """The int64 with the bits of a 64-bit ``word`` of 2**63 or more."""
    return word - 2**64
