"""Native norms, activation and attention on every instruction set of this processor."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from instruments.native_linears import LAYERS

from outrider.kernels.path_attention import PathAttention, PathKeys, path_attention_reference
from outrider.kernels.pointwise import rms_norm, silu_mul

DTYPES = [torch.bfloat16, torch.float32]
SIZES = (1, 7, 8, 20, 64, 100)
BLOCK = 4
NUM_BLOCKS = 200

pytestmark = [
    pytest.mark.skipif(LAYERS is None, reason="the native module is not built or is switched off"),
    pytest.mark.usefixtures("layers_path"),
]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_rounded(got: torch.Tensor, exact: torch.Tensor) -> None:
    """Within half a unit of the dtype, and a little for what float32 lost on the way."""
    torch.testing.assert_close(
        got.double(), exact, rtol=0.51 * torch.finfo(got.dtype).eps + 3e-6, atol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(dtype: torch.dtype, size: int, residual: bool) -> None:
    x, weight = random(5, size, dtype=dtype), random(size, dtype=dtype, seed=1)
    add = random(5, size, dtype=dtype, seed=2) if residual else None
    x[3] *= 1e4
    total = x if add is None else x + add
    exact = F.rms_norm(total.double(), (size,), weight.double(), 1e-5)
    alone = torch.cat([rms_norm(x[r : r + 1].clone(), weight, 1e-5, _row(add, r)) for r in range(5)])
    got = rms_norm(x, weight, 1e-5, add)
    assert_rounded(got, exact)
    assert torch.equal(got, alone)
    assert torch.equal(x, total), "the sum goes into x, rounded once"


def _row(add: torch.Tensor | None, row: int) -> torch.Tensor | None:
    return None if add is None else add[row : row + 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_silu_mul(dtype: torch.dtype, size: int) -> None:
    gate_up = random(5, 2 * size, dtype=dtype)
    gate_up[1] *= 30
    gate_up[2, 0], gate_up[3, -1] = torch.nan, torch.inf
    gate, up = gate_up.double()[:, :size], gate_up.double()[:, size:]
    got = silu_mul(gate_up)
    assert_rounded(got, F.silu(gate) * up)
    assert torch.equal(got[1:2], silu_mul(gate_up[1:2].clone()))


def test_exponentials_are_right_over_their_whole_range() -> None:
    gate = torch.linspace(-120, 120, 100_001)
    got = silu_mul(torch.stack((gate, torch.ones_like(gate)), 1))[:, 0]
    exact = F.silu(gate.double())
    assert (got.double() - exact).abs().max() <= 1e-5
    usual = gate.abs() < 80
    torch.testing.assert_close(got[usual].double(), exact[usual], rtol=5e-7, atol=0)


class Attended:
    """Rows of four texts with trees below them, and what attends them."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, *, qk_norm: bool) -> None:
        rng = np.random.default_rng(0)
        self.shape, (H, G, D) = shape, shape
        blocks = rng.permutation(np.arange(1, NUM_BLOCKS))
        lengths, windows, depths = (
            (1, 9, 30, 150),
            (0, 3, 0, 0),
            ([1, 2], [1, 2], [1, 2], [*range(1, 19), 70]),
        )
        tables = [blocks[i * 40 : i * 40 + 38] for i in range(4)]
        free = (blocks[160:, None] * BLOCK + np.arange(BLOCK)).ravel()
        first_seen, seen, starts, paths, slots = [], [], [], [], []
        for text, length in enumerate(lengths):
            last = tables[text][(length - 1) // BLOCK] * BLOCK + (length - 1) % BLOCK
            chain, free = free[: depths[text][-1]], free[depths[text][-1] :]
            # The root and some of a chain of nodes below it.
            for depth in (0, *depths[text]):
                slots.append(int(chain[depth - 1] if depth else last))
                paths.append(chain[:depth])
                first_seen.append(windows[text])
                seen.append(length)
                starts.append(sum(map(len, tables[:text])))
        self.keys = PathKeys(
            tables=np.concatenate(tables),
            table_starts=np.array(starts),
            first=np.array(first_seen),
            seen=np.array(seen),
            nodes=np.concatenate(paths),
            node_starts=np.cumsum([0, *map(len, paths)]),
        )
        self.slots = torch.tensor(slots)
        self.pool = random(NUM_BLOCKS * BLOCK, 2, G, D, dtype=dtype)
        rows = len(slots)
        self.heads = random(rows, (H + 2 * G) * D, dtype=dtype, seed=1)
        self.turns = torch.polar(
            torch.full((rows, 2, D // 2), 0.5), random(rows, 2, D // 2, seed=2)
        ).contiguous()
        self.norm = random(H + G, D, seed=3) if qk_norm else None

    @property
    def by_pairs(self) -> bool:
        """Whether products are of queries and weights that are rounded to bfloat16."""
        assert LAYERS is not None
        multiplies_pairs = LAYERS.selected() in ("amx", "avx512_bf16")
        return multiplies_pairs and self.heads.dtype is torch.bfloat16 and self.shape[2] % 32 == 0

    def run(self, rows: Any = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """What the rows attend, computed together, and the pool afterwards."""
        H, _, D = self.shape
        taken = np.arange(len(self.slots))[rows].copy()
        keys, pool = self._keys(taken), self.pool.clone()
        heads = self.heads[torch.from_numpy(taken)]
        out = heads.new_empty(len(taken), H * D)
        attention = PathAttention(
            LAYERS,
            keys,
            turns=self.turns,
            positions=torch.from_numpy(taken),
            slots=self.slots[torch.from_numpy(taken)],
            shape=self.shape,
            block=BLOCK,
        )
        attention(heads, self.norm, 1e-5, pool, out)
        return out, pool

    def _keys(self, taken: Any) -> PathKeys:
        keys = self.keys
        paths = [keys.nodes[keys.node_starts[row] : keys.node_starts[row + 1]] for row in taken]
        return PathKeys(
            tables=keys.tables,
            table_starts=keys.table_starts[taken],
            first=keys.first[taken],
            seen=keys.seen[taken],
            nodes=np.concatenate(paths),
            node_starts=np.cumsum([0, *map(len, paths)]),
        )

    def exact(self, filled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the rows attend of the keys and values in ``filled``, and what should be in it, in float64."""
        H, G, D = self.shape
        rows = len(self.slots)
        heads = self.heads.double().view(rows, H + 2 * G, D)
        if self.norm is not None:
            normed = F.rms_norm(heads[:, : H + G], (D,), None, 1e-5) * self.norm.double()
            heads = torch.cat((normed, heads[:, H + G :]), 1)
        pairs = torch.view_as_complex(heads[:, : H + G].reshape(rows, H + G, D // 2, 2).contiguous())
        turns = self.turns.to(torch.complex128)
        turned = torch.cat((pairs[:, :H] * turns[:, :1], pairs[:, H:] * turns[:, 1:]), 1)
        turned = torch.view_as_real(turned).reshape(rows, H + G, D)
        pool = self.pool.double()
        pool[self.slots] = torch.cat((turned[:, H:], heads[:, H + G :]), 1).view(rows, 2, G, D)
        q = turned[:, :H].reshape(rows, G, H // G, D)
        if self.by_pairs:
            q = q.to(torch.bfloat16).double()
        return path_attention_reference(q, filled, self.keys, BLOCK).reshape(rows, H * D), pool


SHAPES = [(4, 4, 8), (6, 2, 20), (3, 1, 64), (8, 2, 66), (5, 1, 2), (7, 1, 128)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention(dtype: torch.dtype, shape: tuple[int, int, int], qk_norm: bool) -> None:
    attended = Attended(shape, dtype, qk_norm=qk_norm)
    got, pool = attended.run()
    want, want_pool = attended.exact(pool)
    assert pool.dtype is dtype
    rounding = 0.51 * torch.finfo(dtype).eps if dtype is torch.bfloat16 else 0
    torch.testing.assert_close(pool.double(), want_pool, rtol=rounding + 1e-5, atol=1e-5)
    of_weights = 2**-8 if attended.by_pairs else 0
    torch.testing.assert_close(got.double(), want, rtol=0.51 * torch.finfo(dtype).eps, atol=2e-5 + of_weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_rows_bits_do_not_depend_on_its_company(
    dtype: torch.dtype, shape: tuple[int, int, int], threads: int
) -> None:
    attended = Attended(shape, dtype, qk_norm=True)
    torch.set_num_threads(threads)
    together, attended.pool = attended.run()
    for row in range(len(attended.slots)):
        # The keys of the others are in place already; its own are written again.
        alone, pool = attended.run([row])
        assert torch.equal(alone[0], together[row])
        assert torch.equal(pool, attended.pool)
    backwards, _ = attended.run(slice(None, None, -1))
    assert torch.equal(backwards.flip(0), together)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [20, 64])
def test_what_is_not_a_number_shows(value: float, dtype: torch.dtype, dim: int) -> None:
    attended = Attended((6, 2, dim), dtype, qk_norm=False)
    # Of the last text; the first component of a query is not 0.
    slot = int(attended.keys.tables[-38]) * BLOCK
    attended.pool[slot, 0, :, 0] = value
    got, _ = attended.run()
    assert got[:9].isfinite().all()
    assert got[9:].isnan().any(1).all() if value != value else not got[9:].isfinite().all()


def test_many_rows_are_split_over_threads_and_stay_the_same(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        H, G, D, rows, length = 4, 2, 64, 64, 512
        keys = PathKeys(
            tables=np.arange(length // BLOCK),
            table_starts=np.zeros(rows, np.int64),
            first=np.zeros(rows, np.int64),
            seen=np.arange(length - rows, length) + 1,
            nodes=np.zeros(0, np.int64),
            node_starts=np.zeros(rows + 1, np.int64),
        )
        heads, results = random(rows, (H + 2 * G) * D), []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out, pool = torch.empty(rows, H * D), random(length, 2, G, D, seed=4)
            attention = PathAttention(
                LAYERS,
                keys,
                turns=torch.ones(rows, 2, D // 2, dtype=torch.complex64),
                positions=torch.arange(rows),
                slots=torch.arange(length - rows, length),
                shape=(H, G, D),
                block=BLOCK,
            )
            attention(heads, None, 1e-5, pool, out)
            results.append(out)
        assert torch.equal(*results)
    assert not caplog.records
