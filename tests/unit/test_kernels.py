"""Kernels against obvious definitions."""

import numpy as np
import pytest
import torch

from outrider.kernels.kv_move import kv_move
from outrider.kernels.linear import Linear, can_pack
from outrider.kernels.tree_attention import STRIDE, TAIL, AttentionGroup, Scratch, TreeAttention

G, Q, D = 2, 3, 16
SLOTS = 400


def naive(q: torch.Tensor, pool: torch.Tensor, slots: list[int]) -> torch.Tensor:
    """One row's attention ``[G, Q, D]`` over exactly these slots, in float64."""
    keys, values = pool[slots, 0].double(), pool[slots, 1].double()
    scores = torch.einsum("gqd,kgd->gqk", q.double(), keys)
    return torch.einsum("gqk,kgd->gqd", scores.softmax(-1), values)


def random_pool() -> torch.Tensor:
    return torch.randn(SLOTS, 2, G, D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("S", [0, STRIDE, 5 * STRIDE])
def test_canonical_attention_is_attention_over_the_path(rows: int, S: int) -> None:
    rng = np.random.default_rng(rows)
    pool, scratch = random_pool(), Scratch(16, (G, Q, D), S + TAIL, torch.float32)
    q = torch.randn(rows, G, Q, D, generator=torch.Generator().manual_seed(1))
    start = 7
    tails = rng.integers(start + S, SLOTS, (rows, TAIL))
    seen = rng.integers(1, TAIL + 1, rows)
    mask = np.where(np.arange(TAIL) < seen[:, None], 0.0, -np.inf).astype(np.float32)
    group = AttentionGroup(
        rows=None,
        num_rows=rows,
        padded=rows + 2,
        shared=torch.arange(start, start + S),
        tail_slots=torch.from_numpy(tails.reshape(-1)),
        tail_mask=torch.from_numpy(mask[:, None]),
    )
    out = torch.empty(rows, G, Q, D)
    TreeAttention([group], (G, Q, D), scratch, rows=rows, canonical=True)(q, pool, out)
    for row in range(rows):
        slots = [*range(start, start + S), *tails[row, : seen[row]].tolist()]
        torch.testing.assert_close(out[row].double(), naive(q[row], pool, slots), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("W", [0, 1, 9])
def test_fast_attention_is_attention_over_prefix_and_path(W: int) -> None:
    rows, S = 4, 70
    rng = np.random.default_rng(W)
    pool, scratch = random_pool(), Scratch(16, (G, Q, D), S + W, torch.float32)
    q = torch.randn(rows, G, Q, D, generator=torch.Generator().manual_seed(1))
    tail = rng.integers(100, SLOTS, W)
    visible = rng.random((rows, W)) < 0.5
    mask = np.where(visible, 0.0, -np.inf).astype(np.float32)
    group = AttentionGroup(
        rows=None,
        num_rows=rows,
        padded=rows,
        shared=torch.arange(3, 3 + S),
        tail_slots=torch.from_numpy(tail),
        tail_mask=torch.from_numpy(mask[:, None]),
    )
    out = torch.empty(rows, G, Q, D)
    TreeAttention([group], (G, Q, D), scratch, rows=rows, canonical=False)(q, pool, out)
    for row in range(rows):
        slots = [*range(3, 3 + S), *tail[visible[row]].tolist()]
        torch.testing.assert_close(out[row].double(), naive(q[row], pool, slots), atol=1e-5, rtol=1e-5)


def test_groups_fill_their_own_rows_and_leave_padding_alone() -> None:
    pool, scratch = random_pool(), Scratch(16, (G, Q, D), 64 + TAIL, torch.float32)
    q = torch.randn(5, G, Q, D, generator=torch.Generator().manual_seed(1))
    members = ([0, 2], [1, 3])
    groups = [
        AttentionGroup(
            rows=torch.tensor(rows),
            num_rows=2,
            padded=4,
            shared=torch.arange(S),
            tail_slots=torch.arange(S, S + TAIL).repeat(2),
            tail_mask=torch.zeros(2, 1, TAIL),
        )
        for rows, S in zip(members, (32, 64), strict=True)
    ]
    out = torch.full((5, G, Q, D), 9.0)
    TreeAttention(groups, (G, Q, D), scratch, rows=4, canonical=True)(q, pool, out)
    for rows, S in zip(members, (32, 64), strict=True):
        for row in rows:
            expected = naive(q[row], pool, list(range(S + TAIL)))
            torch.testing.assert_close(out[row].double(), expected, atol=1e-5, rtol=1e-5)
    assert (out[4] == 9).all()


def test_kv_move_copies_every_layer() -> None:
    pool = torch.randn(3, 20, 2, G, D, generator=torch.Generator().manual_seed(0))
    before = pool.clone()
    kv_move(pool, torch.tensor([15, 12, 19]), torch.tensor([3, 4, 5]))
    assert torch.equal(pool[:, [3, 4, 5]], before[:, [15, 12, 19]])
    others = [slot for slot in range(20) if slot not in (3, 4, 5)]
    assert torch.equal(pool[:, others], before[:, others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 32), (33, 7), (1, 129)])
def test_linear_error_is_not_above_pytorchs(dtype: torch.dtype, bias: bool, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    offset = torch.randn(shape[0], generator=generator).to(dtype) if bias else None
    linear = Linear(weight.clone(), offset)
    assert linear.packed == can_pack(weight)
    for rows in (1, 2, 5, 16):
        x = torch.randn(rows, shape[1], generator=generator).to(dtype)
        exact = x.double() @ weight.double().T + (0 if offset is None else offset.double())
        error = (linear(x).double() - exact).abs().max()
        plain = (torch.nn.functional.linear(x, weight, offset).double() - exact).abs().max()
        # Both round once; which way the last bit falls may differ.
        assert error <= 2 * plain + exact.abs().max() * torch.finfo(dtype).eps
