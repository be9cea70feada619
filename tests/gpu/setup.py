"""Where and how large the checks of ``gpu_check`` are, and what they compare with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

WORST_RATIO = 2.0
"""An error may be so many times PyTorch's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Where and how large.

    shapes: ``(H, G, D)``. context: committed positions of the longest text. tree: nodes of the largest tree.
    rows: of operations row by row. hidden: their size. vocab: tokens.
    timed: pairs of context and sequences that attention is timed with.
    model: of small random models, in transformers' spelling. text: tokens of their texts. samples: texts.
    large: of the model whose steps are timed; None: none is. decoded: tokens before a timed step.
    """

    device: str
    dtypes: Sequence[torch.dtype]
    shapes: Sequence[tuple[int, int, int]]
    context: int
    tree: int
    rows: int
    hidden: int
    vocab: int
    timed: Sequence[tuple[int, int]]
    model: Mapping[str, Any]
    text: int
    samples: int
    large: Mapping[str, Any] | None
    decoded: Sequence[int]


FULL = Setup(
    device="cuda",
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    shapes=((32, 8, 128), (12, 2, 128), (16, 16, 64), (20, 4, 80), (8, 1, 256)),
    context=5000,
    tree=256,
    rows=64,
    hidden=4096,
    vocab=151_936,
    timed=((512, 1), (4096, 1), (32_768, 1), (4096, 16)),
    model={
        "vocab_size": 3000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 2048,
    },
    text=600,
    samples=32,
    large={
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": False,
    },
    decoded=(512, 8192, 32_768),
)

Figures = dict[str, Any]


def random(setup: Setup, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(setup.device)


def ratio_of_errors(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error of ``got`` as a multiple of that of ``plain``.

    An operator of PyTorch's that happens to be exact is given half a unit of its dtype.
    """
    assert got.dtype == plain.dtype
    assert got.isfinite().all()
    unit = exact.abs().max() * torch.finfo(plain.dtype).eps / 2
    own = torch.maximum((plain.double() - exact).abs().max(), unit)
    return float((got.double() - exact).abs().max() / own)


def assert_no_worse(ratios: dict[str, float]) -> Figures:
    worst = {name: round(ratio, 3) for name, ratio in ratios.items()}
    assert all(ratio <= WORST_RATIO for ratio in worst.values()), worst
    return {"error_over_pytorchs": worst}


def name_of(shape: tuple[int, int, int], dtype: torch.dtype) -> str:
    return f"{'x'.join(map(str, shape))} {dtype}".replace("torch.", "")
