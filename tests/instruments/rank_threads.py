"""Ranks of a group as threads of this process."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from outrider.models.batch import Batch, Rows, make_batch
from outrider.models.config import load_config
from outrider.models.decoder import Decoder
from outrider.models.numerics import Numerics, RowClasses
from outrider.models.parallel import LOOPBACK, RankGroup, TensorParallel, find_store, open_store
from outrider.models.weights import Checkpoint
from outrider.speculation.tree import ROOT

Result = TypeVar("Result")


@contextmanager
def groups(size: int, **settings: Any) -> Iterator[list[RankGroup]]:
    """All ranks of a group in this process."""
    store = open_store()
    stores = [store, *(find_store(LOOPBACK, store.port) for _ in range(1, size))]
    with ThreadPoolExecutor(size) as pool:
        joining = [pool.submit(RankGroup, each, rank, size, **settings) for rank, each in enumerate(stores)]
        yield [each.result() for each in joining]


def everywhere(ranks: list[RankGroup], do: Callable[[RankGroup], Result]) -> list[Result]:
    """What each rank got from doing this together."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(do, ranks))


def require_ordered_sums(ranks: list[RankGroup]) -> None:
    """Three ranks' sums are added in the order of the ranks, in float32."""
    # In float32 the first cancel differently in another order; in bfloat16 the last would be lost.
    parts = torch.tensor([[1e8, 1.0, 1.0], [-1e8, 1e-8, 2**-8], [1.0, -1.0, 2**-8]])
    sums = everywhere(ranks, lambda rank: rank.sum(parts[rank.rank].clone()[None]))
    narrow = everywhere(ranks, lambda rank: rank.sum(parts[rank.rank].bfloat16()[None]))
    expected = (parts[0] + parts[1]) + parts[2]
    assert not torch.equal(expected, (parts[2] + parts[1]) + parts[0])
    rounded = parts.bfloat16().float()
    for wide, short in zip(sums, narrow, strict=True):
        assert torch.equal(wide[0], expected)
        assert torch.equal(short[0], ((rounded[0] + rounded[1]) + rounded[2]).bfloat16())


def decoder_of(folder: Path, ranks: TensorParallel) -> Decoder:
    """This rank's part of a model."""
    return Decoder(
        load_config(folder),
        Checkpoint(folder),
        dtype=torch.float32,
        numerics=Numerics.CANONICAL,
        max_model_len=64,
        ranks=ranks,
    )


def some_row(classes: RowClasses, slot: int) -> Batch:
    """Token 5 at position 0, its KV in this slot."""
    none = np.zeros(0, np.int64)
    rows = Rows(
        tokens=np.array([5]), positions=np.array([0]), slots=np.array([slot]), committed=1,
        nodes=np.array([ROOT]), node_parents=none, node_depths=none, node_slots=none,
        table=np.array([slot // 32]), first_logit_row=0,
    )  # fmt: skip
    return make_batch([rows], classes, torch.float32)
