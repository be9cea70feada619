"""``make gpu-check`` itself, on a CPU: its checks hold in Triton's interpreter, and it can fail."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")

from gpu import gpu_check
from instruments import interpreted

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
)


@pytest.fixture(autouse=True)
def _as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    interpreted.repair(monkeypatch)
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


def test_a_check_that_fails_shows_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    silu_mul = gpu_check.pointwise.silu_mul
    monkeypatch.setattr(gpu_check.pointwise, "silu_mul", lambda x: 1.05 * silu_mul(x))
    assert gpu_check.main([gpu_check.check_pointwise, gpu_check.check_race], TINY) == 1
    figures = last_line(capsys)
    assert not figures["ok"]
    assert [figures["checks"][name]["ok"] for name in ("check_pointwise", "check_race")] == [False, True]
