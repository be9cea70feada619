"""A network on several devices, in Triton's interpreter and over gloo, and what becomes of lost ranks."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")

from forwards import bushy_tree, make_runner, opened, random_ids
from instruments import cuda_stand_in
from instruments.rank_threads import decoder_of, everywhere, groups, require_ordered_sums, some_row
from instruments.tensor_ranks import RankServers
from torch._C import _distributed_c10d

from outrider import LLM
from outrider.actors.model_runner import ModelRunner
from outrider.actors.runner import TreeQuery
from outrider.actors.target_worker import TargetLeader, follow
from outrider.cluster import target_rank, tensor_group
from outrider.cluster.cluster_config import parse_config
from outrider.cluster.hosts import RankHost, Security, TargetSettings
from outrider.cluster.target_rank import RankSettings
from outrider.cluster.tensor_group import LocalRanks
from outrider.models import decoder as decoder_module
from outrider.models import device, parallel
from outrider.models.device import CPU, CUDA, check_devices, device_of
from outrider.models.device_link import DeviceLink, open_link
from outrider.models.device_memory import DeviceMemory
from outrider.models.numerics import Numerics
from outrider.models.parallel import RankGroup
from outrider.speculation.errors import InvalidConfigError, TargetGroupError, WorkerError
from outrider.speculation.tree import DraftTree

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    # Not to be divided by two.
    "vocab_size": 333,
    "num_hidden_layers": 1,
}
MODELS: list[tuple[str, dict[str, Any], Numerics]] = [
    ("llama", {"num_hidden_layers": 2}, Numerics.FAST),
    ("qwen3", {}, Numerics.CANONICAL),
    # One key/value head that both ranks hold.
    ("mistral", {"sliding_window": 4, "num_key_value_heads": 1}, Numerics.FAST),
]
PROMPTS = [random_ids(31), random_ids(5, seed=1), random_ids(12, seed=3)]
TREES = [bushy_tree(random_ids(2, seed=4), junk=1)[0], None, DraftTree.empty()]
"""A tree that crosses a block's end, a piece of a prompt, plain decoding."""


@pytest.fixture
def _as_on_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cuda_stand_in.use(monkeypatch, capture=_never)
    with np.errstate(all="ignore"):
        yield


def _never(_: Any) -> Any:
    raise AssertionError("what ranks send each other is not captured")


@pytest.fixture(scope="module")
def servers() -> Iterator[RankServers]:
    made = RankServers(1, "stand-in")
    yield made
    made.close()


def answers(runner: ModelRunner) -> list[torch.Tensor]:
    """Logits of ragged steps: texts, a tree, rows beside it, and rows after some of the tree was accepted."""
    sequences = [opened(runner, prompt[:-1]) for prompt in PROMPTS]
    asked = [
        TreeQuery(sequence=sequence, tokens=prompt[-1:], tree=tree)
        for sequence, prompt, tree in zip(sequences, PROMPTS, TREES, strict=True)
    ]
    together = runner.verify(asked)
    # A path of the tree becomes text, for which entries have to move up on every rank.
    runner.accept(sequences[0], np.array([1, 3]))
    after = runner.verify(
        [TreeQuery(sequence=each, tokens=np.array([7]), tree=DraftTree.empty()) for each in sequences]
    )
    for each in sequences:
        each.close()
    return [*together, *after]


@pytest.mark.usefixtures("_as_on_devices")
@pytest.mark.parametrize(("family", "changes", "numerics"), MODELS, ids=[family for family, *_ in MODELS])
def test_logits_are_those_of_one_rank_and_the_same_again(
    family: str,
    changes: dict[str, Any],
    numerics: Numerics,
    servers: RankServers,
    make_model_folder: Callable[..., Path],
) -> None:
    folder = make_model_folder(family, **{**SMALL, **changes})
    expected = answers(make_runner(folder, num_sequences=4))
    runs = []
    for _ in range(2):
        with servers.runner(folder, 2, numerics=numerics, num_sequences=4) as runner:
            assert runner.decoder.classes.by_tree == (numerics is Numerics.FAST)
            runs.append(answers(runner))
    for ours, again, theirs in zip(*runs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert torch.equal(ours, again)


@pytest.mark.usefixtures("_as_on_devices")
def test_canonical_rows_have_the_same_bits_in_any_company(
    servers: RankServers, make_model_folder: Callable[..., Path]
) -> None:
    folder = make_model_folder("qwen3", **SMALL)
    with servers.runner(folder, 2, num_sequences=4) as runner:
        together = answers(runner)
        for index, (prompt, tree) in enumerate(zip(PROMPTS, TREES, strict=True)):
            alone = TreeQuery(sequence=opened(runner, prompt[:-1]), tokens=prompt[-1:], tree=tree)
            assert torch.equal(runner.verify([alone])[0], together[index])
            alone.sequence.close()


@pytest.mark.usefixtures("_as_on_devices")
def test_devices_add_in_the_order_of_the_ranks_and_rank_0_gets_the_columns() -> None:
    with groups(3) as ranks:
        require_ordered_sums(ranks)
        columns = everywhere(ranks, lambda rank: rank.columns(torch.full((2, 2), float(rank.rank))))
    assert columns[0].tolist() == [[0, 0, 1, 1, 2, 2]] * 2
    assert columns[2].tolist() == [[2, 2]] * 2


@pytest.mark.usefixtures("_as_on_devices")
def test_an_exchange_with_a_lost_rank_fails() -> None:
    with groups(2) as ranks, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ranks[0].sum, torch.ones(1, 1))
        time.sleep(0.1)
        ranks[1].abort("rank 1 burns")
        with pytest.raises(TargetGroupError, match="a rank of the tensor-parallel group of 2 does not"):
            waiting.result()
        with pytest.raises(TargetGroupError, match="does not answer"):
            ranks[0].sum(torch.ones(1, 1))


class Stuck(DeviceLink):
    """A device that waits for a rank which never comes, until its link is closed."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        super().__init__(None, 2, mark=lambda: self.closed.is_set)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack((x, torch.full_like(x, torch.nan)))

    def close(self) -> None:
        self.closed.set()


def test_a_step_that_another_rank_left_gives_no_logits(
    make_model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing the link makes the device finish, with anything as the result."""
    links: list[Stuck] = []

    def stuck(*_: Any, **__: Any) -> DeviceLink:
        links.append(Stuck())
        return links[-1]

    monkeypatch.setattr(parallel, "open_link", stuck)
    folder = make_model_folder("llama")
    with groups(2) as ranks, ThreadPoolExecutor(2) as pool:
        leading, following = everywhere(ranks, partial(decoder_of, folder))
        done = pool.submit(follow, following, ranks[1])
        leader = TargetLeader(leading, ranks[0])
        cache = leader.make_cache(2)
        result = pool.submit(leader.forward, some_row(leading.classes, slot=40), cache)
        time.sleep(0.2)
        too_soon = result.done()
        ranks[0].abort("rank 1 was killed")
        with pytest.raises(TargetGroupError, match=r"^rank 1 was killed$"):
            result.result()
        with pytest.raises(
            TargetGroupError, match="rank 0 of the tensor-parallel group of 2 does not answer"
        ):
            done.result()
    assert not too_soon
    assert all(link.closed.is_set() for link in links)


def test_a_step_that_takes_too_long_ends_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    link = Stuck()
    monkeypatch.setattr(parallel, "open_link", lambda *_, **__: link)
    with groups(2, timeout=0.2) as ranks:
        began = time.monotonic()
        with pytest.raises(TargetGroupError, match="a rank of the tensor-parallel group of 2 does not"):
            ranks[0].settle()
        assert 0.2 <= time.monotonic() - began < 2.0
        assert link.closed.is_set()


@pytest.mark.parametrize("kinds", [(CPU, CUDA), (CUDA, CPU)])
def test_ranks_on_devices_and_on_cpus_do_not_mix(kinds: tuple[torch.device, ...]) -> None:
    store = parallel.open_store()
    stores = [store, parallel.find_store(parallel.LOOPBACK, store.port)]
    with ThreadPoolExecutor(2) as pool:
        joining = [
            pool.submit(RankGroup, each, rank, 2, device=kinds[rank]) for rank, each in enumerate(stores)
        ]
        for each in joining:
            with pytest.raises(TargetGroupError, match="some of the 2 ranks compute on a CUDA device and"):
                each.result()


class Nccl:
    """In place of PyTorch's NCCL backend, of which this machine may have none."""

    made: list[tuple[Any, ...]]
    refusal = ""

    class Options:
        pass

    def __init__(self, _: Any, rank: int, size: int, options: Any) -> None:
        self.made.append((rank, size, options._timeout, options.global_ranks_in_group))

    def _allgather_base(self, parts: torch.Tensor, x: torch.Tensor, options: Any) -> None:
        assert (parts.shape, x.shape, options.asyncOp) == ((2,), (1,), False)
        if self.refusal:
            raise RuntimeError(self.refusal)


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> type[Nccl]:
    monkeypatch.setattr(Nccl, "made", [], raising=False)
    monkeypatch.setattr(_distributed_c10d, "ProcessGroupNCCL", Nccl, raising=False)
    return Nccl


def test_devices_are_linked_by_nccl(nccl: type[Nccl]) -> None:
    store = parallel.open_store()
    assert open_link(CPU, store, 1, 2, timeout=timedelta(seconds=5)) is None
    link = open_link(torch.device("meta"), store, 1, 2, timeout=timedelta(seconds=5))
    assert isinstance(link, DeviceLink)
    assert nccl.made == [(1, 2, timedelta(seconds=5), [0, 1])]


def test_what_nccl_refuses_is_said_in_one_line(nccl: type[Nccl], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "refusal", "NCCL error:\n  Duplicate GPU detected")
    with (
        pytest.raises(
            TargetGroupError,
            match=r"^rank . could not link meta to others: NCCL error: Duplicate GPU detected$",
        ),
        groups(2, device=torch.device("meta")),
    ):
        pass


def test_every_rank_measures_its_device_and_the_scarcest_counts(
    make_model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = iter(
        [
            DeviceMemory(free=70, total=100, step=5),
            DeviceMemory(free=60, total=100, step=7),
        ]
    )
    rehearsed: list[int] = []

    def measured(rehearse: Callable[[], None]) -> DeviceMemory:
        rehearse()
        return next(own)

    monkeypatch.setattr(decoder_module, "measured", measured)
    folder = make_model_folder("llama")
    with groups(2) as ranks, ThreadPoolExecutor(1) as pool:
        decoders = everywhere(ranks, partial(decoder_of, folder))
        for each in decoders:
            monkeypatch.setattr(each, "_rehearse", rehearsed.append)
        done = pool.submit(follow, decoders[1], ranks[1])
        leader = TargetLeader(decoders[0], ranks[0])
        assert leader.memory(512) == DeviceMemory(free=60, total=100, step=7)
        leader.stop()
        assert done.result() is None
    assert rehearsed == [512, 512]


def test_each_rank_has_the_next_device(
    make_model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [device_of(rank, CUDA) for rank in range(2)] == [CUDA, torch.device("cuda:1")]
    assert device_of(1, CPU) == CPU
    started: list[str] = []

    def start(settings: dict[str, Any]) -> Any:
        started.append(settings["device"])
        raise WorkerError("there is no process left")

    monkeypatch.setattr(tensor_group, "check_devices", lambda *_: None)
    monkeypatch.setattr(tensor_group, "_started", start)
    with pytest.raises(WorkerError):
        LocalRanks(
            str(make_model_folder("llama")),
            2,
            dtype="auto",
            numerics=Numerics.FAST,
            max_model_len=None,
            device=CUDA,
        )
    assert started == ["cuda:1"]


def test_a_rank_takes_its_device_before_it_meets_the_others(
    make_model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it shares with them is then made there, and not on the first device."""
    done: list[tuple[str, torch.device]] = []

    def group(*_: Any, device: torch.device, **__: Any) -> Any:
        done.append(("joined", device))
        raise TargetGroupError("the others did not come")

    monkeypatch.setattr(target_rank, "take_device", lambda device: done.append(("taken", device)))
    monkeypatch.setattr(target_rank, "RankGroup", group)
    monkeypatch.setattr(target_rank, "find_store", lambda *_: None)
    settings = RankSettings(
        rank=1, size=2, host=parallel.LOOPBACK, port=1, model=str(make_model_folder("llama")), dtype="auto",
        numerics="fast", max_model_len=None, threads=1, device="cuda:1",
    )  # fmt: skip
    with pytest.raises(TargetGroupError, match="did not come"):
        target_rank.join(settings)
    assert done == [("taken", torch.device("cuda:1")), ("joined", torch.device("cuda:1"))]


def test_more_ranks_than_devices_are_refused(
    monkeypatch: pytest.MonkeyPatch, outrider_: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_devices(1, CUDA)
    check_devices(8, CPU)
    monkeypatch.setattr(device, "is_nccl_available", lambda: False)
    with pytest.raises(InvalidConfigError, match="tensor_parallel_size 2 on device 'cuda' needs NCCL"):
        check_devices(2, CUDA)
    monkeypatch.setattr(device, "is_nccl_available", lambda: True)
    check_devices(2, CUDA)
    line = "tensor_parallel_size 3 needs a CUDA device for each rank, and this process sees 2"
    with pytest.raises(InvalidConfigError, match=f"^{line}$"):
        LLM(tensor_parallel_size=3)
    code, _, err = outrider_("generate", "--device", "cuda", "-tp", "3", "--prompt", "a")
    assert (code, err) == (2, f"outrider: error: {line}\n")


def test_a_rank_on_ray_uses_the_first_device_that_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[RankSettings] = []

    def join(settings: RankSettings) -> Any:
        joined.append(settings)
        raise TargetGroupError("the others did not come")

    monkeypatch.setattr(target_rank, "join", join)
    for count, expected in ((1, ("cuda:0", "fast")), (0, ("cpu", "canonical"))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        config = parse_config({"target": {"tensor_parallel_size": 2, "num_gpus": count}}, "x")
        settings = TargetSettings(name="target-0", config=config, security=Security(), addresses=[])
        with pytest.raises(TargetGroupError, match="did not come"):
            asyncio.run(RankHost("here").start(settings, 1, 5))
        assert (joined[-1].device, joined[-1].numerics) == expected
