"""Triton kernels against their references, in Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")

import triton
import triton.language as tl
from instruments import interpreted
from instruments.paged_batches import BLOCK, PagedBatch, Text, chain, paged_batch

from outrider.kernels import gumbel as gumbel_reference
from outrider.kernels import pointwise as pointwise_reference
from outrider.kernels.gpu import gumbel, pointwise
from outrider.kernels.gpu import tree_attention as tree_module
from outrider.kernels.gpu.kv_move import kv_move
from outrider.kernels.gpu.path_attention import path_attention
from outrider.kernels.gpu.rotary import rotate_and_write
from outrider.kernels.gpu.splits import SPLIT
from outrider.kernels.gpu.tree_attention import tree_attention
from outrider.kernels.kv_move import kv_move as kv_move_reference
from outrider.kernels.paged_attention import (
    PagedPaths,
    TreeKeys,
    paged_path_attention_reference,
    tree_attention_reference,
)
from outrider.kernels.path_attention import PathKeys, path_attention_reference
from outrider.kernels.rotary import rotate_and_write_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(4, 4, 64), (6, 2, 80), (4, 1, 128), (2, 1, 256), (7, 1, 96)]
CASES = [
    *((shape, torch.float32) for shape in SHAPES),
    *((shape, torch.bfloat16) for shape in SHAPES[1:4]),
    (SHAPES[0], torch.float16),
]
BUSHY = [-1, -1, 0, 0, 1, 2, 2, 5, 3, -1]
RAGGED = [
    Text(committed=1, parents=[-1]),
    Text(committed=45, chunk=14),
    Text(committed=BLOCK - 1, parents=BUSHY),
    Text(committed=0, chunk=0),
    Text(committed=0, chunk=0, parents=[-1, 0, 0]),
    Text(committed=2 * BLOCK, parents=chain(5)),
    Text(committed=70),
]
"""A first token, a prompt's end, a tree that crosses a block's end, nothing, a tree below nothing,
a chain that begins with a block, plain decoding."""
PATHS = [Text(committed=33, chunk=2), *RAGGED[2:5]]
LONG = [Text(committed=2 * SPLIT + 40, chunk=2, parents=[-1, 0, 0, 2]), Text(committed=SPLIT), RAGGED[0]]


@pytest.fixture(autouse=True)
def _as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    interpreted.repair(monkeypatch)
    with np.errstate(all="ignore"):
        yield


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_definition(batch: PagedBatch) -> torch.Tensor:
    """Every row over exactly its slots, in float64."""
    rows = []
    for q, slots in zip(batch.q.double(), batch.slots, strict=True):
        entries = batch.pool[slots].double().repeat_interleave(len(q) // batch.pool.shape[2], 2)
        weights = torch.einsum("hd,khd->hk", q, entries[:, 0]).softmax(-1)
        rows.append(torch.einsum("hk,khd->hd", weights, entries[:, 1]))
    return torch.stack(rows)


def assert_attended(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Weights and result are rounded to 16 bits once each; with float32 little is lost at all."""
    assert got.dtype is dtype
    bound = {torch.float32: 1e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(got.double(), exact, rtol=bound, atol=bound)


@pytest.mark.parametrize("window", [None, 9])
def test_references_are_attention_over_exactly_the_rows_slots(window: int | None) -> None:
    batch = paged_batch(RAGGED, (6, 2, 8), torch.float32, window=window)
    exact = by_definition(batch)
    torch.testing.assert_close(tree_attention_reference(batch.q, batch.pool, batch.tree, BLOCK), exact)
    torch.testing.assert_close(paged_path_attention_reference(batch.q, batch.pool, batch.paths, BLOCK), exact)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_tree_attention_of_ragged_batches(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch = paged_batch(RAGGED, shape, dtype)
    got = tree_attention(batch.q, batch.pool, batch.tree, BLOCK)
    assert_attended(got, tree_attention_reference(batch.q, batch.pool, batch.tree, BLOCK), dtype)


@pytest.mark.parametrize(("shape", "dtype"), [CASES[3], *CASES[2::2]])
def test_path_attention_of_ragged_batches(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch = paged_batch(PATHS, shape, dtype)
    got = path_attention(batch.q, batch.pool, batch.paths, BLOCK)
    assert_attended(got, paged_path_attention_reference(batch.q, batch.pool, batch.paths, BLOCK), dtype)


@pytest.mark.parametrize("window", [None, 1, 7, 40, SPLIT + 20])
def test_windows_and_splits(window: int | None) -> None:
    batch = paged_batch(LONG, (3, 1, 64), torch.float32, window=window)
    exact = by_definition(batch)
    assert_attended(tree_attention(batch.q, batch.pool, batch.tree, BLOCK), exact, torch.float32)
    assert_attended(path_attention(batch.q, batch.pool, batch.paths, BLOCK), exact, torch.float32)


@pytest.mark.parametrize("most", [4, 12])
def test_many_rows_are_split_less(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "_ROW_SPLITS", most)
    batch = paged_batch(LONG, (3, 1, 64), torch.float32, window=SPLIT + 20)
    got = tree_attention(batch.q, batch.pool, batch.tree, BLOCK)
    assert tree_module._split_of(len(batch.q), batch.tree.longest) == {4: 2048, 12: 512}[most]
    assert_attended(got, by_definition(batch), torch.float32)


@pytest.mark.parametrize("parents", [chain(256), [-1] * 256, [(node - 1) // 2 for node in range(256)]])
def test_maximal_trees(parents: list[int]) -> None:
    batch = paged_batch([Text(committed=40, parents=parents), Text(committed=3)], (2, 1, 64), torch.float32)
    exact = by_definition(batch)
    assert_attended(tree_attention(batch.q, batch.pool, batch.tree, BLOCK), exact, torch.float32)
    some = torch.tensor([0, 31, 32, 33, 64, 128, 255, 256])
    paths = _rows_of(batch.paths, some)
    assert_attended(path_attention(batch.q[some], batch.pool, paths, BLOCK), exact[some], torch.float32)


@pytest.mark.parametrize("committed", [5, 2 * SPLIT])
def test_a_row_that_attends_nothing_gets_zeros(committed: int) -> None:
    batch = paged_batch([Text(committed=committed, chunk=2, parents=[-1])], (2, 1, 64), torch.float32)
    keys = replace(batch.tree, seen=batch.tree.seen * torch.tensor([1, 0, 1]))
    got = tree_attention(batch.q, batch.pool, keys, BLOCK)
    assert torch.equal(got[1], torch.zeros(2, 64))
    assert_attended(got, tree_attention_reference(batch.q, batch.pool, keys, BLOCK), torch.float32)
    paths = replace(batch.paths, length=batch.paths.length * torch.tensor([1, 0, 1]))
    assert torch.equal(path_attention(batch.q, batch.pool, paths, BLOCK)[1], torch.zeros(2, 64))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_shows_where_it_is_attended(value: float) -> None:
    batch = paged_batch([Text(committed=9, parents=[-1, -1, 0])], (2, 1, 64), torch.float32)
    # The first child's key: seen by itself and by its own child.
    batch.pool[batch.slots[1][-1], 0, 0, 0] = value
    assert (batch.q[:, 0, 0] != 0).all()
    for row in (1, 3):
        assert not tree_attention(batch.q, batch.pool, batch.tree, BLOCK)[row].isfinite().all()
    finite = path_attention(batch.q, batch.pool, batch.paths, BLOCK).isfinite().all(2).all(1)
    assert finite.tolist() == [True, False, True, False]


def test_paths_of_the_engine_are_the_same_paths() -> None:
    batch = paged_batch(RAGGED[:3], (4, 2, 64), torch.float32)
    paths = batch.paths
    keys = PathKeys(
        tables=paths.tables.long().numpy(),
        table_starts=paths.table_starts.numpy(),
        first=np.minimum(1, paths.seen.numpy() - 1),
        seen=paths.seen.numpy(),
        nodes=paths.nodes.numpy(),
        node_starts=np.append(paths.node_starts.numpy(), len(paths.nodes)),
    )
    got = path_attention(batch.q, batch.pool, PagedPaths.of(keys, batch.q.device), BLOCK)
    exact = path_attention_reference(batch.q.view(-1, 2, 2, 64), batch.pool, keys, BLOCK)
    assert_attended(got, exact.view(got.shape), torch.float32)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((6, 2, 64), torch.float32), ((3, 1, 80), torch.bfloat16), ((2, 2, 128), torch.float32)],
)
@pytest.mark.parametrize("committed", [0, 61, SPLIT - 2])
def test_a_nodes_bits_are_those_of_the_same_tokens_committed(
    shape: tuple[int, int, int], dtype: torch.dtype, committed: int
) -> None:
    tree = paged_batch([Text(committed=committed, chunk=0, parents=[-1, 0, 0, 1, 3, 4])], shape, dtype)
    attended = tree.slots[5]
    # The path of the last node, written down elsewhere as text, below a longer neighbour.
    text = paged_batch(
        [Text(committed=SPLIT + 40, parents=[-1]), Text(committed=len(attended))], shape, dtype, seed=1
    )
    text.pool[text.slots[2]] = tree.pool[attended]
    text.q[2] = tree.q[5]
    as_node = path_attention(tree.q[4:], tree.pool, _rows_of(tree.paths, torch.tensor([4, 5])), BLOCK)
    as_text = path_attention(text.q, text.pool, text.paths, BLOCK)
    assert torch.equal(as_node[1], as_text[2])


@pytest.mark.parametrize("window", [None, 50])
def test_a_rows_bits_do_not_depend_on_its_company(window: int | None) -> None:
    batch = paged_batch(LONG, (4, 2, 64), torch.float32, window=window)
    together = path_attention(batch.q, batch.pool, batch.paths, BLOCK)
    for row in range(0, len(batch.q), 2):
        alone = _rows_of(batch.paths, torch.tensor([row]))
        alone = replace(alone, longest=int(alone.length))
        assert torch.equal(path_attention(batch.q[row : row + 1], batch.pool, alone, BLOCK)[0], together[row])


def _rows_of(paths: PagedPaths, rows: torch.Tensor) -> PagedPaths:
    return replace(
        paths,
        table_starts=paths.table_starts[rows],
        seen=paths.seen[rows],
        node_starts=paths.node_starts[rows],
        first=paths.first[rows],
        length=paths.length[rows],
    )


def test_prompts_in_chunks_of_many_rows_cross_tiles() -> None:
    texts = [Text(committed=75, chunk=70), Text(committed=4, chunk=4), Text(committed=38, chunk=37)]
    batch = paged_batch(texts, (3, 1, 64), torch.float32)
    got = tree_attention(batch.q, batch.pool, batch.tree, BLOCK)
    assert_attended(got, by_definition(batch), torch.float32)


def test_many_sequences_find_their_tiles() -> None:
    texts = [Text(committed=1 + i % 5, chunk=i % 3 % (2 + i % 5), parents=chain(i % 4)) for i in range(37)]
    batch = paged_batch(texts, (1, 1, 64), torch.float32)
    got = tree_attention(batch.q, batch.pool, batch.tree, BLOCK)
    assert_attended(got, by_definition(batch), torch.float32)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_keys_are_int32_or_int64(kind: torch.dtype) -> None:
    batch = paged_batch(RAGGED[:3], (2, 1, 64), torch.float32)
    exact = by_definition(batch)
    tree = TreeKeys(**_converted(batch.tree, kind))
    paths = PagedPaths(**_converted(batch.paths, kind))
    assert_attended(tree_attention(batch.q, batch.pool, tree, BLOCK), exact, torch.float32)
    assert_attended(path_attention(batch.q, batch.pool, paths, BLOCK), exact, torch.float32)


def _converted(keys: TreeKeys | PagedPaths, kind: torch.dtype) -> dict[str, torch.Tensor | int]:
    values = {name: getattr(keys, name) for name in keys.__slots__}
    return {
        name: value.to(kind) if name not in ("ancestors", "longest") else value
        for name, value in values.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_moves_in_every_layer(dtype: torch.dtype) -> None:
    pool = random(3, 20, 2, 5, 130, dtype=dtype)
    expected = pool.clone()
    # What is read lies where something else is written, as behind a text whose nodes move up.
    source, target = torch.tensor([15, 4, 19]), torch.tensor([3, 15, 4])
    kv_move(pool, source, target)
    kv_move_reference(expected, source, target)
    assert torch.equal(pool, expected)
    kv_move(pool, source[:0], target[:0])
    assert torch.equal(pool, expected)


def assert_rounded(got: torch.Tensor, exact: torch.Tensor) -> None:
    """Within half a unit of the dtype, and a little for what float32 lost on the way."""
    torch.testing.assert_close(
        got.double(), exact, rtol=0.51 * torch.finfo(got.dtype).eps + 2e-6, atol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 20, 64, 1030])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(dtype: torch.dtype, size: int, residual: bool) -> None:
    x, weight = random(4, size, dtype=dtype), random(size, dtype=dtype, seed=1)
    add = random(4, size, dtype=dtype, seed=2) if residual else None
    x[3] *= 1e3
    total = x if add is None else x + add
    exact = F.rms_norm(total.double(), (size,), weight.double(), 1e-5)
    expected = pointwise_reference.rms_norm(x.clone(), weight, 1e-5, add)
    got = pointwise.rms_norm(x, weight, 1e-5, add)
    assert torch.equal(x, total), "the sum goes into x, rounded once"
    assert_rounded(got, exact)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 20, 1030])
def test_silu_mul(dtype: torch.dtype, size: int) -> None:
    gate_up = random(4, 2 * size, dtype=dtype)
    gate_up[1] *= 60
    gate_up[2, 0], gate_up[3, -1] = torch.nan, torch.inf
    gate, up = gate_up.double()[:, :size], gate_up.double()[:, size:]
    got = pointwise.silu_mul(gate_up)
    assert_rounded(got, F.silu(gate) * up)
    torch.testing.assert_close(got, pointwise_reference.silu_mul(gate_up), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 2, 64), (3, 1, 80), (3, 1, 2)])
@pytest.mark.parametrize("normed", [False, True])
def test_rotation_and_writing(
    dtype: torch.dtype, pool_dtype: torch.dtype, shape: tuple[int, int, int], normed: bool
) -> None:
    rows, (H, G, D) = 2, shape
    heads = random(rows, (H + 2 * G) * D, dtype=dtype)
    norm = random(H + G, D, seed=1) if normed else None
    magnitude = torch.tensor([D**-0.5, 1.0])[:, None].expand(rows, 2, D // 2)
    turns = torch.polar(magnitude, 9 * random(rows, 2, D // 2, seed=2))
    slots = torch.tensor([7, 2])
    pool, before = random(12, 2, G, D, seed=3).to(pool_dtype), heads.clone()
    exact = pool.double()
    exact_norm = None if norm is None else norm.double()
    wide = (heads.double(), exact_norm, 1e-5, turns.to(torch.complex128), slots)
    exact_q = rotate_and_write_reference(*wide, exact)
    expected = pool.clone()
    expected_q = rotate_and_write_reference(heads, norm, 1e-5, turns, slots, expected)
    q = rotate_and_write(heads, norm, 1e-5, turns, slots, pool)
    assert torch.equal(heads, before)
    for got, plain, true in ((q, expected_q, exact_q), (pool, expected, exact)):
        assert got.dtype is pool_dtype
        assert_rounded(got, true)
        assert_rounded(plain, true)


def test_rotation_is_of_pairs_and_scaled_for_queries() -> None:
    heads = torch.tensor([[1.0, 0.0, 1.0, 0.0, 5.0, 6.0]])
    turns = torch.tensor([[[0.5j], [1j]]], dtype=torch.complex64)
    pool = torch.zeros(4, 2, 1, 2)
    q = rotate_and_write(heads, None, 1e-5, turns, torch.tensor([2]), pool)
    assert q.tolist() == [[[0.0, 0.5]]]
    assert pool[2].tolist() == [[[0.0, 1.0]], [[5.0, 6.0]]]
    assert not pool[[0, 1, 3]].any()


@triton.jit
def _write_words(
    base: tl.tensor, gamma: tl.tensor, tokens: tl.tensor, words: tl.tensor, N: tl.constexpr
) -> None:
    at = tl.arange(0, N)
    tl.store(words + at, gumbel.noise_words(tl.load(base), tl.load(gamma), tl.load(tokens + at)))


def test_noise_has_the_documented_bits() -> None:
    edges = [0, 1, 2, 3, 1023, 1024, 151_935, 2**31 - 1]
    tokens = torch.tensor(edges)
    base, gamma = torch.from_numpy(gumbel_reference.stream_keys(2**64 - 5, np.arange(4), 1))
    for row in range(4):
        words = torch.zeros(len(edges), dtype=torch.int64)
        _write_words[(1,)](base[row : row + 1], gamma[row : row + 1], tokens, words, N=len(edges))
        for token, word in zip(edges, words.tolist(), strict=True):
            z = (int(base[row]) + token * int(gamma[row])) % 2**64
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            assert word % 2**32 == z >> 32
            assert -(2**31) <= word < 2**31


def test_noise_is_the_references() -> None:
    keys = torch.from_numpy(gumbel_reference.stream_keys(7, np.arange(5), 0))
    assert torch.equal(gumbel.exponential_noise(*keys, 3001), gumbel_reference.exponential_noise(*keys, 3001))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1, 7, 1024, 2500])
def test_draws_are_the_references(dtype: torch.dtype, vocab_size: int) -> None:
    rows = 6
    base, gamma = torch.from_numpy(gumbel_reference.stream_keys(1, np.arange(rows), 0))
    probs = (3 * random(rows, vocab_size)).exp().to(dtype)
    probs[1, ::2], probs[2], probs[3] = 0, 0, 0
    probs[3, -1] = 0.25
    probs[4, -1] = torch.nan
    probs[5, vocab_size // 2] = torch.inf
    expected = gumbel_reference.draw(probs, base, gamma)
    assert torch.equal(gumbel.draw(probs, base, gamma), expected)
    assert expected[2:].tolist() == [0, vocab_size - 1, vocab_size - 1, vocab_size // 2]


def test_ties_of_a_draw_go_to_the_lowest_id() -> None:
    probs = torch.ones(3, 2200)
    probs[0, [1100, 2100]] = torch.inf
    probs[1, [3, 7, 1500]] = torch.nan
    probs[2] = torch.inf
    keys = torch.from_numpy(gumbel_reference.stream_keys(1, np.arange(3), 0))
    assert gumbel.draw(probs, *keys).tolist() == [1100, 3, 0]


def test_what_is_launched_compiles_for_a_device(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "instruments.compiled_kernels", "90"],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    kernels = {
        *("_attend_tiles", "_attend_paths", "_merge", "_rms_norm", "_silu_mul"),
        *("_rotate", "_kv_move", "_write_noise", "_race", "_earliest"),
    }
    assert set(done.stdout.split()) == {"90", *kernels}
