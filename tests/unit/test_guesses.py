"""What drafters guess: the native kernel against PyTorch's operators and the target's own draws."""

import numpy as np
import pytest
import torch
from instruments.native_linears import LAYERS

from outrider.kernels.guesses import Streams, guesses, guesses_reference
from outrider.speculation.sampling import TokenChooser, streams_of
from outrider.speculation.sampling_params import SamplingParams

pytestmark = [
    pytest.mark.skipif(LAYERS is None, reason="the native module is not built or is switched off"),
    pytest.mark.usefixtures("layers_path"),
]
SIZES = [1, 3, 16, 63, 64, 65, 300, 4096]
SEEDED, GREEDY = SamplingParams(seed=7), SamplingParams(temperature=0)


def streams(rows: int) -> Streams:
    """Of two requests, the first of which draws."""
    first = rows // 2 + 1
    positions = np.arange(rows) // 2 * 3 + 2**33
    choosers = [TokenChooser(SEEDED, choice=3), TokenChooser(GREEDY)]
    return streams_of(choosers, [positions[:first], positions[first:]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_guesses_are_the_references(size: int, dtype: torch.dtype) -> None:
    rows = 9
    padded = 4 * torch.randn(rows, size + 5, generator=torch.Generator().manual_seed(size))
    logits = padded.to(dtype)[:, :size]
    ids, shares = guesses(logits, streams(rows), 6)
    expected, theirs = guesses_reference(logits, streams(rows), min(6, size))
    assert ids.shape == shares.shape == expected.shape
    np.testing.assert_allclose(shares, theirs, rtol=2e-6, atol=1e-12)
    # Equal logits may stand in another order.
    different = ids != expected
    assert not different[: rows // 2 + 1].any()
    np.testing.assert_array_equal(np.sort(shares, axis=1)[:, ::-1], shares)
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    greedy = torch.from_numpy(ids[rows // 2 + 1 :])
    theirs = torch.from_numpy(expected[rows // 2 + 1 :])
    plain = logits[rows // 2 + 1 :]
    assert torch.equal(plain.gather(1, greedy), plain.gather(1, theirs))


def test_the_first_guess_at_the_targets_own_logits_is_its_draw() -> None:
    logits = torch.randn(512, 1000, generator=torch.Generator().manual_seed(2))
    chooser, positions = TokenChooser(SamplingParams(seed=2**63 + 5)), np.arange(512)
    ids, _ = guesses(logits, streams_of([chooser], [positions]), 1)
    assert ids[:, 0].tolist() == chooser.choose(logits, positions).tolist()


def test_of_equal_tokens_the_first_ones_are_guessed() -> None:
    ids, shares = guesses(torch.zeros(5, 200), streams(5), 4)
    assert ids[3:].tolist() == [[0, 1, 2, 3]] * 2
    assert shares[3:] == pytest.approx(1 / 200)


def test_tokens_that_are_out_are_worth_nothing() -> None:
    logits = torch.full((6, 70), -torch.inf)
    logits[:, [5, 68]] = torch.tensor([1.0, 2.0])
    ids, shares = guesses(logits, streams(6), 3)
    assert [set(row[:2]) for row in ids.tolist()] == [{5, 68}] * 6
    assert (shares[:, 2] == 0).all()
    assert shares[:, :2].sum(1) == pytest.approx(1)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 64, 69])
def test_rows_without_a_distribution_guess_nothing(bad: float, place: int) -> None:
    logits = torch.randn(6, 70, generator=torch.Generator().manual_seed(3))
    clean, _ = guesses(logits, streams(6), 3)
    for row in (1, 4):
        logits[row, place] = bad
        if bad < 0:
            logits[row] = bad
    ids, shares = guesses(logits, streams(6), 3)
    assert not shares[[1, 4]].any()
    assert (shares[[0, 2, 3, 5]] > 0).all()
    assert np.array_equal(ids[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])
    assert ((ids >= 0) & (ids < 70)).all()


def test_what_does_not_belong_together_is_refused() -> None:
    logits = torch.randn(4, 30)
    for wrong in (logits[:3], logits.T[:4], logits[:, ::2]):
        with pytest.raises(ValueError, match="logits"):
            guesses(wrong, streams(4), 2)
    with pytest.raises(ValueError, match="do not belong together"):
        guesses(logits, streams(4), 0)


def test_what_is_too_unlikely_for_float32_weighs_nothing() -> None:
    logits = torch.tensor([[0.0, -100.0, -torch.inf]]).repeat(2, 20)
    ids, shares = guesses(logits, streams_of([TokenChooser(GREEDY)], [np.arange(2)]), 21)
    assert ids[:, :20].tolist() == [list(range(0, 60, 3))] * 2
    assert shares[:, 20].tolist() == [0.0, 0.0]
    assert shares[:, :20] == pytest.approx(1 / 20)
