"""Who holds what of a network, and what ranks tell each other; here the ranks are threads."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from instruments.rank_threads import decoder_of, everywhere, groups, require_ordered_sums, some_row
from safetensors import safe_open

from outrider.actors.target_steps import Forward, MakeCache, Measure, Move, Step, Stop, decode, encode
from outrider.actors.target_worker import TargetLeader, follow
from outrider.kernels.paged_attention import TreeKeys
from outrider.kernels.path_attention import PathKeys
from outrider.kernels.tree_attention import AttentionGroup
from outrider.models.batch import Batch
from outrider.models.config import ModelConfig, load_config
from outrider.models.numerics import RowClasses, agreed
from outrider.models.parallel import ALONE, LOOPBACK, RankGroup, TensorParallel, find_store, open_store
from outrider.models.sharding import Shard, check_divisible
from outrider.models.weights import Checkpoint
from outrider.speculation.errors import InvalidConfigError, ModelError, TargetGroupError


class Place(TensorParallel):
    """A rank that is told nothing by the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def test_a_rank_alone_keeps_what_it_has() -> None:
    x = torch.ones(2, 3)
    assert ALONE.sum(x) is x
    assert ALONE.columns(x) is x
    assert ALONE.maximum([3, 1]) == [3, 1]


def test_sums_are_added_in_the_order_of_the_ranks() -> None:
    with groups(3) as ranks:
        require_ordered_sums(ranks)


def test_columns_come_together_at_rank_0() -> None:
    with groups(3) as ranks:
        found = everywhere(ranks, lambda rank: rank.columns(torch.full((2, 2), float(rank.rank))))
    assert found[0].tolist() == [[0, 0, 1, 1, 2, 2]] * 2
    assert found[2].tolist() == [[2, 2]] * 2


@pytest.mark.parametrize("length", [0, 1, 2047, 2048, 5000])
def test_messages_of_every_length_arrive(length: int) -> None:
    message = np.arange(length) - 7
    with groups(3) as ranks:

        def talk(rank: RankGroup) -> list[np.ndarray]:
            if rank.rank:
                return [rank.hear(), rank.hear()]
            rank.tell(message)
            rank.tell(message[::-1])
            return [message, message[::-1]]

        for first, second in everywhere(ranks, talk):
            assert first.tolist() == message.tolist()
            assert second.tolist() == message[::-1].tolist()


def test_classes_suit_every_rank() -> None:
    own = [
        RowClasses(canonical=True, linear=1, attention=4),
        RowClasses(canonical=True, linear=2, attention=1),
    ]
    with groups(2) as ranks:
        found = everywhere(ranks, lambda rank: agreed(own[rank.rank], rank))
        assert found == [RowClasses(canonical=True, linear=2, attention=4)] * 2
        own[1] = replace(own[1], by_path=True)

        def refused(rank: RankGroup) -> str:
            with pytest.raises(ModelError) as error:
                agreed(own[rank.rank], rank)
            return str(error.value)

        assert all("some of the 2 ranks" in each for each in everywhere(ranks, refused))


def test_a_rank_that_does_not_come_is_named() -> None:
    with groups(2, timeout=0.2) as ranks:
        began = time.monotonic()
        with pytest.raises(
            TargetGroupError, match="rank 1 of the tensor-parallel group of 2 does not answer"
        ):
            ranks[0].sum(torch.ones(1, 1))
        assert time.monotonic() - began < 2.0


def test_abort_ends_what_waits_here_and_there() -> None:
    with groups(3) as ranks, ThreadPoolExecutor(2) as pool:
        # Rank 2 never comes.
        waiting = [pool.submit(each.sum, torch.ones(1, 1)) for each in ranks[:2]]
        time.sleep(0.2)
        assert not any(each.done() for each in waiting)
        began = time.monotonic()
        ranks[0].abort("rank 2 burns")
        with pytest.raises(TargetGroupError, match="rank 2 burns"):
            waiting[0].result()
        ranks[2].abort("rank 2 burns")
        with pytest.raises(TargetGroupError, match=r"rank . of the tensor-parallel group of 3"):
            waiting[1].result()
        assert time.monotonic() - began < 2.0
        ranks[0].abort("another reason")
        with pytest.raises(TargetGroupError, match="rank 2 burns"):
            ranks[0].tell(np.arange(3))


def test_who_watches_the_ranks_knows_better() -> None:
    with groups(2, grace=5.0) as ranks, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ranks[0].sum, torch.ones(1, 1))
        time.sleep(0.1)
        ranks[1].abort("here")
        time.sleep(0.1)
        ranks[0].abort("rank 1 was killed")
        with pytest.raises(TargetGroupError, match=r"^rank 1 was killed$"):
            waiting.result()


def test_a_store_listens_on_its_interface_only() -> None:
    store = open_store()
    store.set("a", "b")
    assert find_store(LOOPBACK, store.port).get("a") == b"b"
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening += [line.split() for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
    ours = [each[1] for each in listening if each[1].endswith(f":{store.port:04X}") and each[3] == "0A"]
    assert ours == [f"0100007F:{store.port:04X}"]


@pytest.fixture
def config(make_model_folder: Any) -> ModelConfig:
    return load_config(make_model_folder("llama"))


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"num_heads": 6}, 4, "tensor_parallel_size 4 does not divide the model's 6 attention heads"),
        ({"intermediate_size": 50}, 4, "4 does not divide the model's 50 inner units"),
        ({"num_heads": 12, "num_kv_heads": 6}, 4, "4 neither divides the model's 6 key/value heads"),
        ({}, 0, "positive integer, not 0"),
        ({}, 2.0, "positive integer, not 2.0"),
        ({}, True, "positive integer, not True"),
    ],
)
def test_what_cannot_be_divided_is_named(
    changes: dict[str, int], size: Any, message: str, config: ModelConfig
) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        check_divisible(replace(config, **changes), size)


@pytest.mark.parametrize(("kv_heads", "expected"), [(4, [0, 1, 2, 3]), (2, [0, 0, 1, 1]), (1, [0, 0, 0, 0])])
def test_ranks_hold_the_key_value_head_of_their_queries(
    kv_heads: int, expected: list[int], config: ModelConfig
) -> None:
    D = config.head_dim
    for rank, head in enumerate(expected):
        shard = Shard(replace(config, num_kv_heads=kv_heads), Place(rank, 4))
        assert shard.key_value == slice(head * D, (head + 1) * D)
        assert (shard.own.num_heads, shard.own.num_kv_heads) == (1, 1)


WHOLE = ("norm.weight", "layernorm.weight", "q_norm.weight", "k_norm.weight")
AT_RANK_0 = ("o_proj.bias", "down_proj.bias")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True, "vocab_size": 333}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_rank_reads_its_part_only(
    family: str, changes: dict[str, Any], size: int, make_model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two key/value heads: four ranks read each of them twice, and nothing else."""
    folder = make_model_folder(family, **changes)
    counts: dict[str, list[int]] = {}
    read = Checkpoint.tensor

    def counted(self: Checkpoint, name: str, *args: Any, **slices: Any) -> torch.Tensor:
        part = read(self, name, *args, **slices)
        counts.setdefault(name, []).append(part.numel())
        return part

    monkeypatch.setattr(Checkpoint, "tensor", counted)
    for rank in range(size):
        decoder_of(folder, Place(rank, size))
    with safe_open(folder / "model.safetensors", "pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    assert counts.keys() == sizes.keys()
    for name, parts in counts.items():
        whole = sizes[name]
        if name.endswith(WHOLE):
            assert parts == [whole] * size, name
        elif name.endswith(AT_RANK_0):
            assert parts == [whole], name
        elif "embed" in name or "lm_head" in name:
            assert sum(parts) == whole, name
            assert max(parts) - min(parts) < size * 32, name
        else:
            repeats = 2 if size == 4 and ("k_proj" in name or "v_proj" in name) else 1
            assert parts == [whole * repeats // size] * size, name


def paths() -> PathKeys:
    arrays = [np.arange(count) for count in (3, 2, 2, 2, 0, 3)]
    return PathKeys(
        tables=arrays[0],
        table_starts=arrays[1],
        first=arrays[2],
        seen=arrays[3],
        nodes=arrays[4],
        node_starts=arrays[5],
    )


def attention_groups() -> list[AttentionGroup]:
    mask = torch.tensor([[[0.0, -torch.inf]], [[0.0, 0.0]]])
    return [
        AttentionGroup(
            rows=rows,
            num_rows=2,
            padded=4,
            shared=torch.arange(32, 96),
            tail_slots=torch.arange(4),
            tail_mask=mask,
        )
        for rows in (None, torch.tensor([4, 2]))
    ]


def trees() -> TreeKeys:
    numbers = [torch.arange(count) for count in (2, 3, 1, 2, 2, 40, 2)]
    names = ("row_starts", "tables", "table_starts", "first", "seen", "node_slots", "node_starts")
    # The highest bit of a word makes it negative.
    words = torch.tensor([[1, 0], [-(2**31), 255]], dtype=torch.int32)
    return TreeKeys(**dict(zip(names, numbers, strict=True)), ancestors=words, longest=77)


def batch(attended: Any, logit_rows: Any) -> Batch:
    return Batch(
        tokens=torch.tensor([7, 2**40]),
        positions=torch.tensor([0, 1]),
        slots=torch.tensor([5, 9]),
        attended=attended,
        logit_rows=logit_rows,
    )


@pytest.mark.parametrize("attended", [paths(), attention_groups(), trees()], ids=["paths", "groups", "trees"])
@pytest.mark.parametrize("wanted", [slice(0, 0), slice(1, 2), torch.tensor([0, 2])], ids=repr)
def test_steps_arrive_as_they_were(attended: Any, wanted: Any) -> None:
    steps: list[Step] = [
        Move(torch.tensor([4, 3]), torch.tensor([8, 1])),
        Measure(512),
        MakeCache(17),
        Forward(batch(attended, wanted)),
        Stop(),
    ]
    found = list(decode(encode(steps), torch.float32))
    assert repr(found) == repr(steps)


def test_a_message_holds_nothing_but_numbers() -> None:
    """And what decoded steps hold is of the types that a device's batch is packed from."""
    message = encode([Forward(batch(trees(), slice(0, 1)))])
    assert message.dtype == np.int64
    (step,) = decode(message, torch.float32)
    assert isinstance(step, Forward)
    found = step.batch.attended
    assert isinstance(found, TreeKeys)
    assert (found.ancestors.dtype, found.tables.dtype) == (torch.int32, torch.int64)
    assert found.ancestors.tolist() == [[1, 0], [-(2**31), 255]]


def test_followers_do_what_the_leader_does(make_model_folder: Any) -> None:
    """A cache each, and moves in it before the next forward; then they may go."""
    folder = make_model_folder("llama")
    with groups(2) as ranks, ThreadPoolExecutor(1) as pool:
        leading, following = everywhere(ranks, partial(decoder_of, folder))
        caches = []
        make = following.make_cache
        following.make_cache = lambda count: caches.append(make(count)) or caches[-1]  # type: ignore[method-assign]
        done = pool.submit(follow, following, ranks[1])
        leader = TargetLeader(leading, ranks[0])
        cache = leader.make_cache(2)
        leader.forward(some_row(leading.classes, slot=40), cache)
        cache.move(torch.tensor([40]), torch.tensor([50]))
        leader.forward(some_row(leading.classes, slot=41), cache)
        leader.stop()
        assert done.result() is None
        with pytest.raises(TargetGroupError, match="has been stopped"):
            leader.make_cache(1)
    for pool_ in (cache.pool, caches[-1].pool):
        assert pool_.shape == (2, 96, 2, 1, 8)
        assert pool_[:, 40].any()
        assert torch.equal(pool_[:, 50], pool_[:, 40])


def test_followers_end_without_their_leader(make_model_folder: Any) -> None:
    with groups(2) as ranks, ThreadPoolExecutor(1) as pool:
        done = pool.submit(follow, decoder_of(make_model_folder("llama"), Place(1, 2)), ranks[1])
        ranks[0].abort("gone")
        with pytest.raises(
            TargetGroupError, match="rank 0 of the tensor-parallel group of 2 does not answer"
        ):
            done.result()


def test_a_step_that_is_given_up_ends_the_group(
    make_model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks wait in the middle of it, and would take the next step's numbers for this one's."""
    with groups(2) as ranks, ThreadPoolExecutor(1) as pool:
        leading, following = everywhere(ranks, partial(decoder_of, make_model_folder("llama")))
        done = pool.submit(follow, following, ranks[1])
        leader = TargetLeader(leading, ranks[0])
        cache = leader.make_cache(1)
        monkeypatch.setattr(leading, "forward", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            leader.forward(some_row(leading.classes, slot=40), cache)
        with pytest.raises(TargetGroupError, match="given up: KeyboardInterrupt"):
            leader.make_cache(1)
        with pytest.raises(TargetGroupError, match="rank 0 of the tensor-parallel group of 2"):
            done.result()
