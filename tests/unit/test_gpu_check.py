"""``make gpu-check`` itself, on a CPU: its checks hold in Triton's interpreter, and it can fail."""

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")

from gpu import gpu_check, ranks, whole_models
from instruments import interpreted

from outrider.models import cuda_graphs

TINY = gpu_check.Setup(
    device="cpu",
    dtypes=(torch.bfloat16,),
    shapes=((2, 1, 64),),
    context=36,
    tree=4,
    rows=3,
    hidden=64,
    vocab=1500,
    timed=(),
    model={
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 64,
    },
    text=7,
    samples=1,
    large=None,
    decoded=(),
)


@pytest.fixture(autouse=True)
def _as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    interpreted.repair(monkeypatch)
    monkeypatch.setattr(cuda_graphs, "ROWS", (1, 8))
    with np.errstate(all="ignore"):
        yield


def last_line(capsys: pytest.CaptureFixture[str]) -> gpu_check.Figures:
    figures: gpu_check.Figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    return figures


def test_without_a_device_nothing_is_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main() == 0
    assert last_line(capsys) == {"ran": False}


def test_all_checks_hold_in_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(setup=TINY) == 0
    figures = last_line(capsys)
    assert figures["ok"]
    assert list(figures["checks"]) == [check.__name__ for check in gpu_check.CHECKS]
    assert figures["checks"]["check_canonical_bits"]["rows"] > 0
    assert figures["checks"]["check_two_ranks"]["death_noticed_s"] > 0


def test_two_ranks_need_two_devices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpu_check.check_two_ranks(replace(TINY, device="cuda")) == {"ran": False}
    assert "check_two_ranks did nothing: this process sees fewer than two" in capsys.readouterr().out


def test_runs_of_two_ranks_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = ranks._logits
    runs = iter(range(100))
    monkeypatch.setattr(ranks, "_logits", lambda *args: [each + next(runs) for each in logits(*args)])
    with pytest.raises(AssertionError):
        gpu_check.check_two_ranks(TINY)


def test_steps_of_a_large_model_can_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_models, "copy_bandwidth", lambda _: 1e9)
    monkeypatch.setattr(whole_models, "REPEATS", 1)
    monkeypatch.setattr(whole_models, "WARM", 0)
    monkeypatch.setattr(cuda_graphs, "ROWS", (1,))
    setup = replace(TINY, large={**TINY.model, "tie_word_embeddings": False}, decoded=(4,))
    figures = whole_models.time_decoding(setup)
    assert figures["copy_gb_per_s"] == 1
    assert figures["price of canonical at 4"] > 0
    for name in ("canonical, captured", "fast, captured", "fast, eager"):
        assert figures[name]["4"]["ms"] > 0
        assert figures[name]["4"]["of_copy_bandwidth"] >= 0


def test_a_check_that_fails_shows_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    silu_mul = gpu_check.pointwise.silu_mul
    monkeypatch.setattr(gpu_check.pointwise, "silu_mul", lambda x: 1.05 * silu_mul(x))
    assert gpu_check.main([gpu_check.check_pointwise, gpu_check.check_race], TINY) == 1
    figures = last_line(capsys)
    assert not figures["ok"]
    assert [figures["checks"][name]["ok"] for name in ("check_pointwise", "check_race")] == [False, True]
