"""Where models run: what a user may ask for, and what a device's memory is divided into."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from outrider import LLM
from outrider.cluster import device_memory, kv_memory
from outrider.cluster.loading import numerics_of, rows_of
from outrider.models.device import CPU, CUDA, choose_device
from outrider.models.device_memory import DeviceMemory, measured
from outrider.models.numerics import Numerics
from outrider.speculation.errors import InvalidConfigError

MIB = 2**20


def with_devices(patch: pytest.MonkeyPatch, there: bool) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: there)


def test_auto_is_cuda_where_there_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    with_devices(monkeypatch, False)
    assert choose_device("auto") == choose_device("cpu") == CPU
    with_devices(monkeypatch, True)
    assert choose_device("auto") == choose_device("cuda") == CUDA
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("name", ["gpu", "cuda:1", "", None])
def test_other_names_are_refused(name: Any) -> None:
    with pytest.raises(InvalidConfigError, match="device must be auto, cpu or cuda, not"):
        choose_device(name)


def test_cuda_that_is_not_there_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with_devices(monkeypatch, False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        InvalidConfigError, match=r"^device 'cuda' cannot be used: this PyTorch .* without CUDA$"
    ):
        LLM(device="cuda")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(InvalidConfigError, match="sees no CUDA device with CUDA_VISIBLE_DEVICES=''"):
        choose_device("cuda")


@pytest.mark.parametrize("command", ["generate", "draft-worker"])
def test_a_command_says_so_in_one_line(
    command: str, outrider_: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_devices(monkeypatch, False)
    words = ("--prompt", "a") if command == "generate" else ()
    code, _, err = outrider_(command, "--device", "cuda", *words)
    assert code == 2
    assert err.startswith("outrider: error: device 'cuda' cannot be used: ")
    assert len(err.splitlines()) == 1


def test_numerics_and_rows_follow_the_device() -> None:
    assert numerics_of(None, CPU) is Numerics.CANONICAL
    assert numerics_of(None, CUDA) is Numerics.FAST
    assert numerics_of("canonical", CUDA) is Numerics.CANONICAL
    assert rows_of(None, Numerics.FAST, CPU) == 64
    assert rows_of(None, Numerics.FAST, CUDA) == 512
    assert rows_of(2048, Numerics.FAST, CUDA) == 2048
    for rows, numerics, device in ((65, Numerics.FAST, CPU), (65, Numerics.CANONICAL, CUDA)):
        with pytest.raises(InvalidConfigError, match="from 1 to 64, not 65"):
            rows_of(rows, numerics, device)


def test_float64_is_for_cpus(demo_folder: Any) -> None:
    from outrider.models.loader import load_model

    with pytest.raises(InvalidConfigError, match="dtype float64 is for device cpu, not cuda"):
        load_model(demo_folder, dtype="float64", numerics=Numerics.FAST, max_model_len=None, device=CUDA)


@pytest.fixture
def demo_folder() -> str:
    from outrider.models.demo import pair

    return str(pair.DRAFT)


def test_what_is_left_of_a_device() -> None:
    # 10 of 80 are taken, 72 may be in the end, a step takes 2.
    assert device_memory.left(0.9, 70, 80, 2) == 60
    assert device_memory.left(0.5, 20, 80, 2) == -22


class Network(SimpleNamespace):
    """Texts of 320 tokens, 10 blocks, of a MiB each, on a device with so much memory."""

    device, block_bytes, max_model_len = CUDA, MIB, 320

    def __init__(self, *, free: int, total: int, step: int) -> None:
        self.left = DeviceMemory(free=free * MIB, total=total * MIB, step=step * MIB)
        self.rehearsed: list[int] = []

    def memory(self, rows: int) -> DeviceMemory:
        self.rehearsed.append(rows)
        return self.left


def test_what_a_step_takes_is_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 10)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: done.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 17)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70, 100))
    assert measured(lambda: done.append("run")) == DeviceMemory(free=70, total=100, step=7)
    assert done == ["reset", "run", "emptied"]


def test_a_targets_cache_takes_what_weights_and_a_step_leave() -> None:
    network: Any = Network(free=70, total=100, step=5)
    given: dict[str, Any] = {"kv_cache_memory": None, "max_num_seqs": 64, "max_nodes": 16, "max_rows": 512}
    assert kv_memory.kv_blocks(network, gpu_memory_utilization=None, **given) == 90 - 30 - 5
    assert kv_memory.kv_blocks(network, gpu_memory_utilization=0.5, **given) == 50 - 30 - 5
    assert network.rehearsed == [512, 512]
    with pytest.raises(InvalidConfigError, match="room for 160 tokens, less than max_model_len 320"):
        kv_memory.kv_blocks(network, gpu_memory_utilization=0.4, **given)
    few = {**given, "max_num_seqs": 1}
    assert kv_memory.kv_blocks(network, gpu_memory_utilization=None, **few) == 11


def test_a_draft_models_cache_takes_what_is_free() -> None:
    network: Any = Network(free=50, total=100, step=0)
    # A session has 10 blocks of text and 8 of nodes.
    assert device_memory.draft_blocks(network, 2) == 36
    assert device_memory.draft_blocks(network, 9) == 45
    assert network.rehearsed == [0, 0]
    network = Network(free=19, total=100, step=0)
    with pytest.raises(InvalidConfigError, match="19 MiB are free on the device, too little"):
        device_memory.draft_blocks(network, 2)
