"""The native draw: the winner is that of PyTorch's race, whatever the row, on every instruction set."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from instruments.native_linears import LAYERS

from outrider.kernels.gumbel import draw, draw_reference, exponential_noise, exponential_race, stream_keys

pytestmark = [
    pytest.mark.skipif(LAYERS is None, reason="the native module is not built or is switched off"),
    pytest.mark.usefixtures("layers_path"),
]
SIZES = [1, 2, 15, 16, 63, 64, 65, 300, 4096, 5001]


def keys(rows: int, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    base, gamma = torch.from_numpy(stream_keys(seed, np.arange(rows), 0))
    return base, gamma


def values(rows: int, size: int, sharpness: float = 1.0) -> torch.Tensor:
    logits = sharpness * torch.randn(rows, size, generator=torch.Generator().manual_seed(size))
    return (logits - logits.amax(1, keepdim=True)).exp_()


def assert_same_winners(probs: torch.Tensor, streams: torch.Tensor | None = None) -> None:
    base, gamma = keys(len(probs))
    assert torch.equal(draw(probs, base, gamma, streams), draw_reference(probs, base, gamma, streams))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 10.0, 60.0])
def test_usual_rows(size: int, sharpness: float) -> None:
    assert_same_winners(values(200, size, sharpness))


def nearly_tied(noise: torch.Tensor) -> torch.Tensor:
    """Values by which the race is decided by some units in the last place."""
    generator = torch.Generator().manual_seed(1)
    ulps = torch.randint(-3, 4, noise.shape, generator=generator, dtype=torch.int32)
    return (noise.view(torch.int32) + ulps).view(torch.float32)


@pytest.mark.parametrize("size", [7, 64, 1000])
def test_tokens_that_all_but_tie(size: int) -> None:
    noise = exponential_noise(*keys(400), size)
    probs = nearly_tied(noise)
    assert len(exponential_race(probs, noise).unique()) > 3
    assert_same_winners(probs)


def test_tokens_with_the_most_noise_that_all_but_tie() -> None:
    noise = exponential_noise(*keys(400), 5001)
    most = noise.topk(4, dim=1).indices
    probs = torch.zeros_like(noise).scatter_(1, most, nearly_tied(noise).gather(1, most))
    assert_same_winners(probs)


def test_scores_on_the_verge_of_infinity() -> None:
    noise = exponential_noise(*keys(400), 300)
    probs = nearly_tied(noise) * torch.finfo(torch.float32).max
    assert_same_winners(probs.where(noise < 0.9, 0.0))


def nothing(probs: torch.Tensor) -> None:
    probs[:] = 0


def not_numbers(probs: torch.Tensor) -> None:
    probs[::2, 70] = torch.nan
    probs[::3, 20] = torch.nan


def infinite(probs: torch.Tensor) -> None:
    probs[::2, 70] = torch.inf
    probs[::3, 20] = torch.inf


def tiny(probs: torch.Tensor) -> None:
    probs *= 1e-35


def huge(probs: torch.Tensor) -> None:
    probs *= 1e35


def denormal(probs: torch.Tensor) -> None:
    probs *= 1e-40


@pytest.mark.parametrize("change", [nothing, not_numbers, infinite, tiny, huge, denormal])
def test_unusual_rows(change: Callable[[torch.Tensor], None]) -> None:
    probs = values(60, 200)
    change(probs)
    assert_same_winners(probs)


@pytest.mark.usefixtures("threads")
def test_rows_that_share_a_stream_on_several_threads() -> None:
    probs = values(50, 5001)
    streams = torch.arange(50) % 7 * 5
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert_same_winners(probs, streams)


def test_rows_with_gaps_between_them() -> None:
    assert_same_winners(values(20, 300)[:, 10:210])


def test_a_stream_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="streams or sizes that do not belong together"):
        draw(values(2, 5), *keys(2), torch.tensor([0, 2]))


def test_float64_is_pytorchs() -> None:
    assert_same_winners(values(30, 100).double())
