"""Laying out a forward's rows: the native pass against NumPy."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from outrider.kernels.native import library
from outrider.models import batch
from outrider.models.batch import Rows
from outrider.models.block_pool import BLOCK, blocks_for
from outrider.speculation.tree import ROOT

BATCHER = library.batcher(Rows, BLOCK)
pytestmark = pytest.mark.skipif(BATCHER is None, reason="the native module was not built")


def some_rows(rng: np.random.Generator) -> Rows:
    """The end of a text and some nodes of a tree below it, not all of them, in any order."""
    committed, text, capacity = int(rng.integers(1, 200)), int(rng.integers(0, 3)), int(rng.integers(1, 40))
    text = min(text, committed)
    parents, depths = np.full(capacity, ROOT), np.ones(capacity, np.int64)
    order = rng.permutation(capacity)
    for place, node in enumerate(order[1:], 1):
        if rng.random() < 0.8:
            parents[node] = order[rng.integers(0, place)]
            depths[node] = depths[parents[node]] + 1
    own = rng.permutation(capacity)[: rng.integers(0 if text else 1, 9)]
    nodes = np.concatenate((np.full(text, ROOT), own))
    count = len(nodes)
    return Rows(
        tokens=rng.integers(0, 1000, count),
        positions=np.concatenate((np.arange(committed - text, committed), committed - 1 + depths[own])),
        slots=rng.integers(2, 5000, count),
        committed=committed,
        nodes=nodes,
        node_parents=parents,
        node_depths=depths,
        node_slots=rng.integers(2, 5000, capacity),
        table=rng.integers(1, 90, blocks_for(committed) + 2),
        first_logit_row=0,
    )


@pytest.mark.parametrize("window", [None, 1, 7, 60])
@pytest.mark.parametrize("seed", range(25))
def test_one_native_pass_lays_out_what_numpy_does(seed: int, window: int | None) -> None:
    rng = np.random.default_rng(seed)
    parts = [some_rows(rng) for _ in range(rng.integers(1, 5))]
    *own, keys = batch._by_path(parts, window)
    for got, want in zip(own, batch._joined(parts), strict=True):
        assert np.array_equal(got, want)
    expected = batch._path_keys(parts, window)
    for field in fields(expected):
        got, want = getattr(keys, field.name), getattr(expected, field.name)
        assert got.dtype == want.dtype == np.int64
        assert np.array_equal(got, want), field.name


def rows(**changes: Any) -> Rows:
    """A chain of three nodes below 40 tokens."""
    chain = Rows(
        tokens=np.arange(3),
        positions=np.arange(40, 43),
        slots=np.arange(70, 73),
        committed=40,
        nodes=np.arange(3),
        node_parents=np.arange(3) - 1,
        node_depths=np.arange(3) + 1,
        node_slots=np.arange(70, 73),
        table=np.array([1, 2]),
        first_logit_row=0,
    )
    return replace(chain, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": np.arange(2)}, "do not belong together"),
        ({"node_slots": np.arange(2)}, "do not belong together"),
        ({"table": np.array([1])}, "do not belong together"),
        ({"committed": -1}, "do not belong together"),
        ({"nodes": np.array([0, 1, 3])}, "row 2 has no path"),
        ({"nodes": np.array([0, -2, 1])}, "row 1 has no path"),
        ({"node_parents": np.array([2, 0, 1])}, "row 0 has no path"),
        ({"node_parents": np.array([-1, 0, 7])}, "row 2 has no path"),
        ({"node_depths": np.array([1, 2, 2])}, "row 2 has no path"),
    ],
)
def test_what_is_no_tree_is_refused(changes: dict[str, Any], message: str) -> None:
    assert BATCHER is not None
    BATCHER([rows()], -1)
    with pytest.raises(ValueError, match=message):
        BATCHER([rows(), rows(**changes)] if "row" not in message else [rows(**changes)], -1)


def test_what_are_no_rows_is_refused() -> None:
    assert BATCHER is not None
    for wrong in ([object()], 7, [rows(tokens=np.arange(3, dtype=np.int32))], [rows(slots=[1, 2, 3])]):
        with pytest.raises(TypeError):
            BATCHER(wrong, -1)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="committed"):
        type(BATCHER)(object, BLOCK)
