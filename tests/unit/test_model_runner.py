"""What one step costs in memory, and what a runner keeps for a sequence."""

from typing import Any

import numpy as np
import pytest
import torch
from forwards import MAX_NODES, bushy_tree, extend, make_runner, opened, random_ids, verify
from torch.profiler import ProfilerActivity, profile

from outrider.actors.model_runner import ModelRunner
from outrider.models.kv_cache import KVSequence
from outrider.models.numerics import MAX_ROWS, Numerics


def allocated_bytes(runner: ModelRunner, sequence: KVSequence, nodes: int) -> int:
    """Bytes that one tree step requests from the allocator."""
    tree, _ = bushy_tree(random_ids(nodes), junk=0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        verify(runner, sequence, 5, tree)
    sequence.length -= 1
    return sum(max(0, event.self_cpu_memory_usage) for event in recorded.events())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("numerics", list(Numerics))
def test_no_step_allocates_in_proportion_to_the_context(numerics: Numerics, make_model_folder: Any) -> None:
    runner = make_runner(make_model_folder("llama"), numerics=numerics)
    sequence = opened(runner, random_ids(70))
    short = allocated_bytes(runner, sequence, nodes=5)
    extend(runner, sequence, random_ids(384))
    long = allocated_bytes(runner, sequence, nodes=5)
    assert short > 0
    assert long <= short * 1.05
    assert allocated_bytes(runner, sequence, nodes=20) > 2 * long, "the measure sees allocations"


def test_prefill_takes_prompts_of_every_length(make_model_folder: Any) -> None:
    runner = make_runner(make_model_folder("llama"))
    for count in (0, 1, MAX_ROWS - 1, MAX_ROWS, MAX_ROWS + 1, 3 * MAX_ROWS + 7):
        sequence = opened(runner, random_ids(count))
        assert sequence.length == count
        sequence.close()
    runner.cache.check_idle()


def test_the_largest_tree_fits_one_forward(make_model_folder: Any) -> None:
    runner = make_runner(make_model_folder("llama"))
    sequence = opened(runner, random_ids(0))
    tree, path = bushy_tree(random_ids(21), junk=2)
    assert len(tree) == MAX_NODES == MAX_ROWS - 1
    assert verify(runner, sequence, 3, tree).shape == (MAX_ROWS, 320)
    runner.accept(sequence, np.array(path))
    assert sequence.length == 22


def test_rows_that_only_fill_up_a_class_do_not_come_back(make_model_folder: Any) -> None:
    """Rows padded to a class must not leak into the result."""
    runner = make_runner(make_model_folder("llama"), torch.float64)
    assert runner.decoder.classes.linear > 1, "float64 has no packed kernels and pads"
    sequence = opened(runner, random_ids(0))
    tree, _ = bushy_tree(random_ids(2), junk=1)
    assert verify(runner, sequence, 3, tree).shape == (5, 320)
