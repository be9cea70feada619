"""Ranks that die, hang or cannot load, and what is left of them: nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from threading import Timer
from typing import Any, NoReturn

import pytest
import torch
from instruments.processes import children, runs, until

from outrider import LLM, SamplingParams
from outrider.actors.target_worker import TargetLeader
from outrider.cluster import tensor_group
from outrider.cluster.target_rank import RankSettings
from outrider.cluster.tensor_group import LocalRanks
from outrider.models.loader import load_model
from outrider.models.numerics import Numerics
from outrider.models.parallel import LOOPBACK, open_store
from outrider.speculation.errors import TargetGroupError

NOTICED_SECONDS = 2.0
SETTINGS: dict[str, Any] = {"dtype": "auto", "numerics": Numerics.CANONICAL, "max_model_len": None}
ENDLESS = SamplingParams(temperature=0.7, seed=3, max_tokens=400, ignore_eos=True)


@pytest.fixture
def ours() -> Iterator[Callable[[], list[int]]]:
    """Processes that the test has started and that still run; none may be left in the end."""
    before = set(children(os.getpid()))

    def started() -> list[int]:
        return [pid for pid in children(os.getpid()) if pid not in before]

    yield started
    assert started() == []


@pytest.fixture
def folder(make_model_folder: Any) -> Path:
    return make_model_folder("llama", vocab_size=333)


def test_texts_are_the_same_until_a_rank_dies(folder: Path, ours: Callable[[], list[int]]) -> None:
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=24, n=2)
    config = {"model": str(folder), "num_speculative_tokens": 6}
    torch.set_num_threads(2)
    with LLM(str(folder), speculative_config=config, tensor_parallel_size=2) as llm:
        assert torch.get_num_threads() == 1
        texts = [
            [each.token_ids for each in llm.generate("the quick", params, speculative=how)[0].outputs]
            for how in (True, False)
        ]
        assert texts[0] == texts[1]
        (pid,) = ours()
        killed = []

        def kill() -> None:
            killed.append(time.monotonic())
            os.kill(pid, signal.SIGKILL)

        Timer(0.3, kill).start()
        with pytest.raises(
            TargetGroupError, match="rank 1 of the tensor-parallel target was killed by signal 9"
        ):
            llm.generate(["the quick", "a lazy"], ENDLESS)
        assert time.monotonic() - killed[0] < NOTICED_SECONDS
        with pytest.raises(TargetGroupError, match="rank 1"):
            llm.generate("the quick", params)
    assert torch.get_num_threads() == 2


def make_caches_for_ever(leader: TargetLeader) -> NoReturn:
    while True:
        leader.make_cache(1)


def test_a_rank_that_hangs_is_given_up_when_someone_says_so(
    folder: Path, ours: Callable[[], list[int]]
) -> None:
    ranks = LocalRanks(str(folder), 2, **SETTINGS)
    assert ranks.leader is not None
    assert ranks.pids == ours()
    os.kill(ranks.pids[0], signal.SIGSTOP)
    told = []

    def tell() -> None:
        told.append(time.monotonic())
        ranks.abort("rank 1 is on a machine that burns")

    Timer(0.3, tell).start()
    with pytest.raises(TargetGroupError, match="a machine that burns"):
        make_caches_for_ever(ranks.leader)
    assert time.monotonic() - told[0] < NOTICED_SECONDS
    ranks.close()


def test_a_rank_that_cannot_load_its_part_says_why(
    folder: Path, tmp_path: Path, ours: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    monkeypatch.setattr(tensor_group, "load_model", lambda _, **how: load_model(str(folder), **how))
    with pytest.raises(TargetGroupError, match=r"rank 1 .* ended with code 1: .*safetensors is truncated"):
        LocalRanks(str(damaged), 2, **SETTINGS)
    assert ours() == []


PARENT = """
import subprocess, sys, time
command = [sys.executable, "-m", "outrider.cluster.target_rank", sys.argv[1]]
print(subprocess.Popen(command, stdin=subprocess.PIPE).pid, flush=True)
time.sleep(600)
"""


def test_a_rank_ends_with_its_parent(folder: Path) -> None:
    """Also while it waits for the others."""
    store = open_store()
    settings = RankSettings(
        rank=1, size=2, host=LOOPBACK, port=store.port, model=str(folder), dtype="auto",
        numerics="canonical", max_model_len=None, threads=1,
    )  # fmt: skip
    words = [sys.executable, "-c", PARENT, json.dumps(asdict(settings))]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "ready\n"
    assert runs(pid)
    parent.kill()
    parent.wait()
    assert until(lambda: not runs(pid), NOTICED_SECONDS)
    parent.stdout.close()
