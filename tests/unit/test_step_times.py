"""What a target step costs, measured at the start or read from a file; and memory for its cache."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forwards import make_runner

from outrider.actors.model_runner import ModelRunner
from outrider.actors.step_times import measured_step_times, saved_step_times
from outrider.cluster import kv_memory
from outrider.cluster.kv_memory import kv_blocks, parse_bytes
from outrider.models.block_pool import blocks_for
from outrider.speculation.errors import InvalidConfigError


@pytest.fixture
def runner(make_model_folder: Any) -> ModelRunner:
    return make_runner(make_model_folder("llama"))


def test_measured_times_rise_and_leave_nothing_behind(runner: ModelRunner) -> None:
    times = measured_step_times(runner, 40)
    assert len(times) == 32
    assert times[0] > 0
    assert (np.diff(times) >= 0).all()
    runner.cache.check_idle()


def test_no_more_is_measured_than_there_is_time_for(runner: ModelRunner) -> None:
    assert len(measured_step_times(runner, 64, seconds=0.0)) == 1


def test_a_profile_is_written_once_and_then_read(runner: ModelRunner, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    written = saved_step_times(path, runner, 8)
    assert json.loads(path.read_text()) == {"step_seconds": written.tolist()}
    path.write_text('{"step_seconds": [1, 2, 2.5]}')
    assert saved_step_times(path, runner, 8).tolist() == [1.0, 2.0, 2.5]


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"a": 1}', '{"step_seconds": []}', '{"step_seconds": [2, 1]}', '{"step_seconds": [0]}'],
)
def test_what_is_no_profile_is_refused(text: str, runner: ModelRunner, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(InvalidConfigError, match="must hold step_seconds"):
        saved_step_times(path, runner, 8)
    with pytest.raises(InvalidConfigError, match="No such file"):
        saved_step_times(tmp_path / "none" / "profile.json", runner, 8)


def blocks(runner: ModelRunner, **settings: Any) -> int:
    given = {
        "kv_cache_memory": None,
        "gpu_memory_utilization": None,
        "max_num_seqs": 4,
        "max_nodes": 16,
        "max_rows": 64,
    }
    decoder: Any = runner.decoder
    return kv_blocks(decoder, **{**given, **settings})


def test_memory_is_what_is_asked_for(runner: ModelRunner) -> None:
    context, size = runner.max_model_len, runner.decoder.block_bytes  # type: ignore[attr-defined]
    assert blocks(runner) == 4 * blocks_for(context + 17)
    assert blocks(runner, kv_cache_memory=40 * size + 7) == 40
    assert blocks(runner, kv_cache_memory=f"{100 * size}") == 100


def test_memory_is_bounded_by_the_machine_s(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    size = runner.decoder.block_bytes  # type: ignore[attr-defined]
    monkeypatch.setattr(kv_memory, "machine_bytes", lambda: 200 * size)
    monkeypatch.setattr(kv_memory, "used_bytes", lambda: 70 * size)
    assert blocks(runner, max_num_seqs=64) == 30
    assert blocks(runner, max_num_seqs=64, gpu_memory_utilization=1.0) == 130
    assert blocks(runner, max_num_seqs=64, gpu_memory_utilization=1.0, processes=2) == 30
    with pytest.raises(InvalidConfigError, match=r"room for 320 tokens, less than max_model_len 512"):
        blocks(runner, kv_cache_memory=10 * size)
    with pytest.raises(InvalidConfigError, match=f"kv_cache_memory must be at most .*, not {201 * size}"):
        blocks(runner, kv_cache_memory=201 * size)


@pytest.mark.parametrize("size", ["much", True, -1, 1.5, "-3GB"])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(InvalidConfigError, match="kv_cache_memory must be bytes or a size such as 4GiB"):
        parse_bytes(size)
