"""One forward over rows of several sequences is each sequence's forward, bit for bit."""

from typing import Any

import numpy as np
import pytest
import torch
from forwards import bushy_tree, make_runner, opened, random_ids, verify
from instruments.ragged_checks import MAX_SEQUENCES, check_ragged_forwards

from outrider.actors.model_runner import ModelRunner
from outrider.actors.runner import TreeQuery
from outrider.models.batch import text_rows
from outrider.models.numerics import MAX_ROWS, Numerics
from outrider.speculation.tree import DraftTree

SHAPES: dict[str, dict[str, Any]] = {
    # Heads in groups of three, sizes that fill no vector register.
    "llama": {"hidden_size": 60, "intermediate_size": 100, "num_attention_heads": 6, "head_dim": 20},
    "qwen3": {"head_dim": 16},
}


def runner_for(folder: Any, dtype: torch.dtype, numerics: Numerics = Numerics.CANONICAL) -> ModelRunner:
    return make_runner(folder, dtype, numerics, num_sequences=MAX_SEQUENCES + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("family", "threads"), [("llama", 1), ("llama", 2), ("qwen3", 1)])
def test_rows_are_the_same_as_alone(
    family: str, dtype: torch.dtype, threads: int, make_model_folder: Any
) -> None:
    torch.set_num_threads(threads)
    check_ragged_forwards(runner_for(make_model_folder(family, **SHAPES[family]), dtype))


def test_fast_numerics_are_close(make_model_folder: Any) -> None:
    folder = make_model_folder("llama", **SHAPES["llama"])
    check_ragged_forwards(runner_for(folder, torch.float32, Numerics.FAST), tolerance=1e-4)


def test_verify_answers_every_query(make_model_folder: Any) -> None:
    runner = runner_for(make_model_folder("llama"), torch.float32)
    trees = [bushy_tree(random_ids(4), junk=2)[0], DraftTree.empty(), bushy_tree(random_ids(7), junk=0)[0]]
    queries = [
        TreeQuery(sequence=opened(runner, random_ids(length)), tokens=np.array([7]), tree=tree)
        for length, tree in zip((40, 3, 70), trees, strict=True)
    ]
    alone = []
    for query in queries:
        assert query.tree is not None
        alone.append(verify(runner, query.sequence, int(query.tokens[0]), query.tree))
        query.sequence.length -= 1
    together = runner.verify(queries)
    for mine, theirs in zip(together, alone, strict=True):
        assert torch.equal(mine, theirs)
    assert [query.sequence.length for query in queries] == [41, 4, 71]


def test_more_rows_than_a_forward_takes_are_refused(make_model_folder: Any) -> None:
    runner = runner_for(make_model_folder("llama"), torch.float32)
    counts = (MAX_ROWS - 3, 4)
    parts = [
        text_rows(opened(runner, np.zeros(0, np.int64)), random_ids(count), first_logit_row=count)
        for count in counts
    ]
    with pytest.raises(AssertionError, match="65 rows"):
        runner.forward(parts)
