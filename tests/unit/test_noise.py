"""The noise is uniform, independent in every argument, and never changes.

All seeds are fixed, so a test fails always or never. ``ALARM`` is the chance that one
statistic of ideal noise would have been beyond its bound.
"""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from outrider.kernels.gumbel import exponential_noise, exponential_race, stream_keys

ALARM = 1e-6
WORD = 2**64

GOLDEN_KEYS = [
    [
        8514128412773175793,
        -2046927326879639266,
        -5322870205772949516,
        -3341256343404806637,
        692236795550869350,
        -6246513866999167598,
    ],
    [
        -5217103284791904897,
        3821157697898586863,
        -513923165134451637,
        2194206873589541635,
        5255025343960917943,
        -7661751031537915433,
    ],
]
GOLDEN_NOISE = [
    [2.8826587200164795, 2.0121824741363525, 1.215039610862732, 0.6231696009635925],
    [0.10693582892417908, 0.412147581577301, 2.347651481628418, 0.22977866232395172],
]


def noise(
    seeds: npt.ArrayLike, positions: npt.ArrayLike, choices: npt.ArrayLike, vocab_size: int
) -> torch.Tensor:
    words = [np.asarray(word).astype(np.uint64) for word in (seeds, positions, choices)]
    base, gamma = torch.from_numpy(stream_keys(*words))
    return exponential_noise(base, gamma, vocab_size)


def uniforms(exponentials: torch.Tensor) -> npt.NDArray[np.float64]:
    u: npt.NDArray[np.float64] = (-torch.expm1(-exponentials.double())).numpy()
    return u


def finalise(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def unfinalise(z: int) -> int:
    """Inverse of ``finalise``, found bit by bit."""
    for shift, multiplier in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        word = z
        for _ in range(64 // shift):
            word = z ^ (word >> shift)
        z = word * pow(multiplier, -1, WORD) % WORD
    return z


def slow_noise(base: int, gamma: int, token: int) -> float:
    top = finalise((base + token * gamma) % WORD) >> 32
    # The last xor-shift of SplitMix64 is left out, which moves the lowest of the top bits.
    top ^= top >> 31
    u = ((top ^ 2**31) + 0.5) / 2**32
    return float(np.float32(-math.log1p(-u)))


def test_noise_is_the_documented_function() -> None:
    keys = stream_keys(np.array([7, WORD - 1], np.uint64), np.array([0, 2**40]), np.array([0, 3]))
    fast = exponential_noise(torch.from_numpy(keys[0]), torch.from_numpy(keys[1]), 500)
    slow = [[slow_noise(int(b) % WORD, int(g) % WORD, t) for t in range(500)] for b, g in keys.T]
    assert fast.tolist() == slow


def test_keys_never_change() -> None:
    seeds = np.array([0, 0, 0, 1, 2**63, WORD - 1], np.uint64)
    keys = stream_keys(seeds, np.array([0, 1, 0, 0, 5, 2**20]), np.array([0, 0, 1, 0, 0, 2]))
    assert keys.tolist() == GOLDEN_KEYS


def test_noise_never_changes() -> None:
    assert noise([0, 12345], [0, 678], [0, 1], 4).tolist() == GOLDEN_NOISE


def test_keys_take_scalars_and_signed_seeds() -> None:
    signed = stream_keys(-1, np.arange(3), 0)
    assert np.array_equal(
        signed, stream_keys(np.full(3, WORD - 1, np.uint64), np.arange(3), np.zeros(3, int))
    )
    assert np.array_equal(signed, stream_keys(WORD - 1, np.arange(3), 0))


def test_every_seed_choice_and_position_has_its_own_keys() -> None:
    """False alarm for ideal keys: 2**36 pairs in 2**63 values, below 1e-8."""
    grid = np.meshgrid(np.arange(64), np.arange(64), np.arange(64), indexing="ij")
    keys = stream_keys(*(axis.ravel() for axis in grid))
    assert keys.shape == (2, 64**3)
    assert [len(np.unique(row)) for row in keys] == [64**3, 64**3]
    assert (keys[1] % 2 == 1).all()


def test_bits_are_uniform() -> None:
    u = uniforms(noise(3, np.arange(512), 0, 4096)).ravel()
    high = np.bincount((u * 1024).astype(int), minlength=1024)
    # Bits 14 to 21 of u survive the rounding of E to float32.
    middle = (u[(u >= 0.25) & (u < 0.5)] * 2**21).astype(int) % 256
    assert stats.chisquare(high).pvalue > ALARM
    assert stats.chisquare(np.bincount(middle, minlength=256)).pvalue > ALARM


def test_exponential_law_with_both_tails() -> None:
    sample = noise(4, np.arange(1024), 0, 4096).double().numpy().ravel()
    edges = np.concatenate([[0], 2.0 ** np.arange(-17, 3), np.arange(5, 13), [np.inf]])
    counts = np.histogram(sample, edges)[0]
    expected = np.diff(-np.expm1(-edges)) * sample.size
    assert expected.min() > 20
    assert stats.chisquare(counts, expected).pvalue > ALARM
    assert stats.kstest(sample[::8], "expon").pvalue > ALARM


def neighbours(axis: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Uniforms that differ by one step along ``axis``, flat and paired."""
    near, far, step = np.arange(0, 256), np.arange(1, 257), 4096
    if axis == "token":
        u = uniforms(noise(9, near, 0, step + 1))
        return u[:, :-1].ravel(), u[:, 1:].ravel()
    pairs = {
        "position": (noise(9, near, 0, step), noise(9, far, 0, step)),
        "seed": (noise(near, 9, 0, step), noise(far, 9, 0, step)),
        "choice": (noise(9, 5, near, step), noise(9, 5, far, step)),
        "seed and position": (noise(near, far, 0, step), noise(far, near, 0, step)),
        "choice and position": (noise(9, near, far, step), noise(9, far, near, step)),
    }
    return uniforms(pairs[axis][0]).ravel(), uniforms(pairs[axis][1]).ravel()


@pytest.mark.parametrize(
    "axis", ["token", "position", "seed", "choice", "seed and position", "choice and position"]
)
def test_neighbours_are_independent(axis: str) -> None:
    u, v = neighbours(axis)
    cells = np.bincount((u * 32).astype(int) * 32 + (v * 32).astype(int), minlength=1024)
    assert stats.chisquare(cells).pvalue > ALARM
    bound = float(stats.norm.isf(ALARM / 2)) / math.sqrt(u.size)
    assert abs(np.corrcoef(u, v)[0, 1]) < bound
    # Small values decide races, so the small corner is looked at on its own.
    corner = int(((u < 2**-7) & (v < 2**-7)).sum())
    assert stats.binomtest(corner, u.size, 2**-14).pvalue > ALARM


def test_single_bits_of_a_seed_decorrelate() -> None:
    """65 rows, 2,080 pairs: the chance of any false alarm is 2,080 times ALARM."""
    seeds = np.concatenate([[np.uint64(0)], np.uint64(1) << np.arange(64, dtype=np.uint64)])
    r = np.asarray(np.corrcoef(uniforms(noise(seeds, 0, 0, 8192))))
    assert np.abs(r[np.triu_indices(65, 1)]).max() * math.sqrt(8192) < stats.norm.isf(ALARM / 2)


@pytest.mark.parametrize("gamma", [1, 3, -1, 2**32 + 1, 0x5555555555555555])
def test_regular_increments_do_no_harm(gamma: int) -> None:
    bases = torch.from_numpy(stream_keys(1, np.arange(16), 0)[0])
    u = uniforms(exponential_noise(bases, torch.full((16,), gamma), 2**16))
    cells = np.histogram2d(u[:, :-1].ravel(), u[:, 1:].ravel(), bins=32, range=[[0, 1]] * 2)[0]
    assert stats.chisquare(cells.ravel()).pvalue > ALARM


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("vocab_size", [1, 7, 4099])
def test_a_row_is_the_same_in_any_batch(rows: int, vocab_size: int) -> None:
    batch = noise(5, np.arange(rows), 0, vocab_size)
    for row in range(rows):
        assert torch.equal(batch[row], noise(5, [row], 0, vocab_size)[0])
    longer = noise(5, np.arange(rows), 0, vocab_size + 13)
    assert torch.equal(batch, longer[:, :vocab_size])


def test_extreme_bits_give_finite_positive_noise() -> None:
    tops = [0x80000000, 0x7FFFFFFF, 0x00000000, 0xFFFFFFFF]
    bases = [unfinalise((top ^ (top >> 31)) << 32 | top >> 31) for top in tops]
    signed = torch.tensor(np.array(bases, np.uint64).view(np.int64))
    e = exponential_noise(signed, torch.ones_like(signed), 1)[:, 0].double()
    expected = [2.0**-33, 33 * math.log(2), math.log(2), math.log(2)]
    np.testing.assert_allclose(e.numpy(), expected, rtol=1e-7)
    assert bool(((e > 0) & e.isfinite()).all())


PEAKED = [1 - 1.1e-3, 1e-3, 1e-4]
DISTRIBUTIONS = {
    "uniform": [1 / 50] * 50,
    "two": [0.3, 0.7],
    "peaked": PEAKED,
    "zeros": [0.0, 0.5, 0.0, 0.25, 0.25, 0.0],
    "geometric": (0.5 ** np.arange(1, 13)).tolist(),
}


def race(p: list[float], positions: npt.NDArray[np.int64], scale: float = 1.0) -> npt.NDArray[np.int64]:
    probs = (torch.tensor(p, dtype=torch.float32) * scale).expand(len(positions), -1)
    return exponential_race(probs, noise(21, positions, 0, len(p))).numpy()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_race_draws_from_p(name: str) -> None:
    p = np.array(DISTRIBUTIONS[name])
    p /= p.sum()
    winners = race(p.tolist(), np.arange(200_000))
    counts = np.bincount(winners, minlength=len(p))
    assert not counts[p == 0].any()
    expected = p[p > 0] * len(winners)
    assert expected.min() > 15
    assert stats.chisquare(counts[p > 0], expected).pvalue > ALARM


def test_race_at_the_next_position_is_another_draw() -> None:
    """Winners at neighbouring positions agree as often as independent draws do."""
    p = np.array([0.1, 0.2, 0.3, 0.4])
    winners = race(p.tolist(), np.arange(100_001))
    agreed = int((winners[1:] == winners[:-1]).sum())
    assert stats.binomtest(agreed, 100_000, float((p**2).sum())).pvalue > ALARM


def test_race_ignores_the_sum_of_p() -> None:
    positions = np.arange(2000)
    assert np.array_equal(race(PEAKED, positions), race(PEAKED, positions, scale=2.0**-9))


def test_race_ties_go_to_the_lowest_id() -> None:
    noise_row = torch.tensor([[4.0, 2.0, 1.0, 1.0, 3.0]])
    probs = torch.tensor([[0.0, 0.5, 0.25, 0.25, 0.75]])
    assert exponential_race(probs, noise_row).tolist() == [1]


def test_race_shows_nan() -> None:
    probs = torch.tensor([[0.5, float("nan"), 0.5]])
    assert exponential_race(probs, torch.ones(1, 3)).tolist() == [1]
