"""A row's bits depend on its path alone (docs/numerics.md), compared bit for bit."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from forwards import bushy_tree, chunked_logits, make_runner, opened, random_ids, verify

from outrider.kernels.native import library
from outrider.models.numerics import MAX_ROWS, Numerics

LENGTH = 330
"""Ten canonical prefixes: beyond 64 keys and over many blocks."""
# An odd shape: heads in groups of three, sizes that fill no vector register.
ODD = {
    "hidden_size": 60,
    "intermediate_size": 100,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "vocab_size": 333,
}


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture
def by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and norms as where the native ones were not built."""
    monkeypatch.setattr(library, "layers", lambda _: None)


@pytest.fixture(
    params=[
        (torch.float32, True),
        (torch.bfloat16, True),
        (torch.bfloat16, False),
        (torch.float64, False),
    ],
    ids=["float32", "bfloat16", "bfloat16 by PyTorch", "float64"],
)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    dtype, native = request.param
    if not native:
        request.getfixturevalue("by_pytorch")
    elif library.layers(torch.empty(0, dtype=dtype)) is None:
        pytest.skip("the native module is not built or is switched off")
    return dtype


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("family", "shape"), [("llama", ODD), ("qwen3", {"head_dim": 16})])
def test_every_way_to_a_row_gives_its_bits(
    family: str, shape: dict[str, Any], dtype: torch.dtype, make_model_folder: Any
) -> None:
    runner = make_runner(make_model_folder(family, **shape), dtype, num_sequences=1)
    ids = random_ids(LENGTH)
    plain, sequence = chunked_logits(runner, ids, [1] * LENGTH)
    sequence.close()

    for chunks in ([64, 64, 64, 64, 64, 10], [7, 33, 1, 2, 3, 60, 64, 5, 25, 50, 50, 30]):
        chunked, sequence = chunked_logits(runner, ids, chunks)
        sequence.close()
        assert torch.equal(chunked, plain), f"chunks {chunks}"

    # Roots before, at and after the boundaries of prefixes and of their 64-key tails.
    for root in (0, 1, 30, 31, 32, 62, 63, 64, 95, 96, 127, 150, 286):
        for depth, junk in ((1, 3), (5, 2), (20, 2), (31, 1), (32, 0)):
            sequence = opened(runner, ids[:root])
            tree, path = bushy_tree(ids[root + 1 : root + 1 + depth], junk)
            logits = verify(runner, sequence, int(ids[root]), tree)
            rows = [0, *(node + 1 for node in path)]
            assert torch.equal(logits[rows], plain[root : root + 1 + depth]), (root, depth, junk)
            sequence.close()
    runner.cache.check_idle()


@pytest.mark.usefixtures("threads")
def test_rows_after_commits_are_those_of_plain_decoding(dtype: torch.dtype, make_model_folder: Any) -> None:
    runner = make_runner(make_model_folder("llama", **ODD), dtype, num_sequences=2)
    ids = random_ids(LENGTH)
    plain, plain_sequence = chunked_logits(runner, ids, [1] * LENGTH)
    sequence = opened(runner, ids[:0])
    rng = np.random.default_rng(1)
    root = 0
    while root + 12 < LENGTH:
        tree, path = bushy_tree(ids[root + 1 : root + 1 + int(rng.integers(1, 11))], junk=2)
        logits = verify(runner, sequence, int(ids[root]), tree)
        assert torch.equal(logits[0], plain[root]), f"root at {root}"
        accepted = np.array(path[: int(rng.integers(0, len(path) + 1))], np.int64)
        runner.accept(sequence, accepted)
        root += 1 + len(accepted)
        assert sequence.length == root
    pool = runner.cache.pool
    ours = pool[:, sequence.slots(0, root)]
    theirs = pool[:, plain_sequence.slots(0, root)]
    assert torch.equal(ours, theirs), "KV after commits"


@pytest.mark.usefixtures("by_pytorch")
def test_fast_numerics_do_not_promise_it(make_model_folder: Any) -> None:
    """If this fails, fast has become canonical and one of them can go."""
    runner = make_runner(make_model_folder("llama", **ODD), torch.float32, Numerics.FAST, num_sequences=2)
    ids = random_ids(LENGTH)
    plain, _ = chunked_logits(runner, ids, [1] * LENGTH)
    chunked, _ = chunked_logits(runner, ids, [64] * 5 + [10])
    assert not torch.equal(chunked, plain)
    torch.testing.assert_close(chunked, plain, atol=1e-4, rtol=1e-4)


def test_row_classes_cover_every_batch(make_model_folder: Any, dtype: torch.dtype) -> None:
    classes = make_runner(make_model_folder("llama"), dtype).decoder.classes
    assert classes.canonical
    for rows in range(1, MAX_ROWS + 1):
        for padded, quantum in (
            (classes.linear_rows(rows), classes.linear),
            (classes.attention_rows(rows), classes.attention),
        ):
            assert rows <= padded < rows + quantum
            assert padded % quantum == 0
