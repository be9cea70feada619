"""A target divided among ranks: the same logits, each row with the same bits whatever is beside it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from forwards import bushy_tree, chunked_logits, make_runner, random_ids, verify
from instruments.ragged_checks import MAX_SEQUENCES, check_ragged_forwards
from instruments.tensor_ranks import RankServers

from outrider.actors.model_runner import ModelRunner
from outrider.models.numerics import Numerics
from outrider.speculation.tree import DraftTree

TOLERANCE = 1e-4
# Four of everything that four ranks share, but for key/value heads; a vocabulary that they do not divide.
FOUR = {"num_attention_heads": 8, "intermediate_size": 60, "vocab_size": 333}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "kv-head-each": ("llama", {"num_key_value_heads": 4}),
    "shared-kv-heads": ("llama", {"num_key_value_heads": 2}),
    "one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"num_key_value_heads": 4, "head_dim": 16}),
}
LENGTH = 80


@pytest.fixture(scope="module")
def servers() -> Iterator[RankServers]:
    made = RankServers(3)
    yield made
    made.close()


def some_logits(runner: ModelRunner, ids: np.ndarray) -> list[torch.Tensor]:
    """Of chunks, of single rows, of a tree, and of a row after some of the tree was accepted."""
    chunked, sequence = chunked_logits(runner, ids, [64, len(ids) - 64])
    sequence.close()
    plain, sequence = chunked_logits(runner, ids[:10], [1] * 10)
    tree, path = bushy_tree(ids[11:17], junk=2)
    drafted = verify(runner, sequence, int(ids[10]), tree)[[0, *(node + 1 for node in path)]]
    runner.accept(sequence, np.array(path))
    (after,) = verify(runner, sequence, int(ids[17]), DraftTree.empty())
    sequence.close()
    return [chunked, plain, drafted, after]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_one_rank(
    name: str, size: int, servers: RankServers, make_model_folder: Any
) -> None:
    family, config = MODELS[name]
    folder = make_model_folder(family, **{**FOUR, **config})
    ids = random_ids(LENGTH)
    with servers.runner(folder, size) as runner:
        ours = some_logits(runner, ids)
    theirs = some_logits(make_runner(folder), ids)
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.shape == expected.shape
        assert (mine - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("size", "dtype"), [(2, "float32"), (2, "bfloat16"), (2, "float64"), (4, "float32")])
def test_every_way_to_a_row_gives_its_bits(
    size: int, dtype: str, servers: RankServers, make_model_folder: Any
) -> None:
    ids = random_ids(LENGTH)
    with servers.runner(make_model_folder("llama", **FOUR), size, dtype=dtype) as runner:
        plain, sequence = chunked_logits(runner, ids, [1] * LENGTH)
        sequence.close()
        chunked, drafted, after = (some_logits(runner, ids)[index] for index in (0, 2, 3))
        runner.cache.check_idle()
    assert torch.equal(chunked, plain)
    assert torch.equal(drafted, plain[10:17])
    assert torch.equal(after, plain[17])


@pytest.mark.parametrize("size", [2, 4])
def test_rows_beside_other_sequences_are_the_same_as_alone(
    size: int, servers: RankServers, make_model_folder: Any
) -> None:
    folder = make_model_folder("qwen3", **FOUR, head_dim=16)
    with servers.runner(folder, size, num_sequences=MAX_SEQUENCES + 1) as runner:
        check_ragged_forwards(runner)


def test_fast_numerics_are_close(servers: RankServers, make_model_folder: Any) -> None:
    folder, ids = make_model_folder("llama", **FOUR), random_ids(LENGTH)
    with servers.runner(folder, 2, dtype="float64", numerics=Numerics.FAST) as runner:
        ours = some_logits(runner, ids)
    for mine, expected in zip(ours, some_logits(make_runner(folder), ids), strict=True):
        assert (mine - expected).abs().max() <= TOLERANCE
