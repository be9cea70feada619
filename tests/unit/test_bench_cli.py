"""``outrider bench kernels`` as a stranger types it, and what it measures."""

import json
from collections.abc import Callable

import pytest
import torch

from outrider.cluster.bench import kernels
from outrider.cluster.bench.kernels import Plan, count, deeper, measure
from outrider.cluster.bench.machine import Limits
from outrider.kernels.native import library
from outrider.models.config import load_config
from outrider.models.demo import pair

Run = Callable[..., tuple[int, str, str]]
TINY = Plan(rows=(1, 3), contexts=(40,), turns=1, copied_bytes=1 << 20)
CONFIG = load_config(pair.DRAFT)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "QUICK", TINY)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("tiny")
def test_the_table_as_text_and_as_json(outrider_: Run) -> None:
    code, text, err = outrider_("bench", "kernels", "--quick", "--model", str(pair.DRAFT))
    assert (code, err) == (0, "")
    lines = text.splitlines()
    assert lines[0].strip() == "draft"
    assert lines[1].split() == [
        "kernel",
        "type",
        "rows",
        "µs",
        "reference",
        "ratio",
        "GB/s",
        "copy",
        "Gop/s",
        "peak",
    ]
    assert lines[2].split()[:4] == ["qkv", "320x192", "bf16", "1"]
    assert "…" not in text
    code, out, err = outrider_("bench", "kernels", "--quick", "--model", str(pair.DRAFT), "--json")
    assert (code, err) == (0, "")
    result = json.loads(out.splitlines()[-1])
    assert result["threads"] == 1
    assert result["limits"]["copy"] > 0
    assert len(result["kernels"]) == count(CONFIG, TINY) == len(lines) - 4
    assert {each["dtype"] for each in result["kernels"]} == {"bfloat16", "float32", "int8"}


@pytest.mark.usefixtures("tiny")
def test_by_default_the_embedded_target_and_one_of_120m(
    outrider_: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    monkeypatch.setattr(kernels, "measure", lambda name, config, *_: measured.append((name, config)) or ())
    code, _, _ = outrider_("bench", "kernels")
    assert code == 0
    assert [(name, config.num_layers) for name, config in measured] == [("demo target", 6), ("120M", 76)]


def test_a_deeper_model_is_as_small_as_it_may_be() -> None:
    config = load_config(pair.TARGET)
    of_block = 384 * (640 + 384 + 3 * 1024)
    assert deeper(config, 120_000_000).num_layers == -(-(120_000_000 - 4096 * 384) // of_block)


def test_both_ways_compute_the_same() -> None:
    compared = set()
    for case in kernels._cases(CONFIG, TINY):
        if case.name.startswith("sampling"):
            continue
        ours, theirs = case.ours[0](), case.reference[0]()
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0.02)
            compared.add(case.name.split()[0])
    assert compared == {"qkv", "output", "gate_up", "down", "head", "silu_mul"}


def test_rates_follow_from_times() -> None:
    limits = Limits(copy=1e9, operations=2e9)
    results = list(measure("draft", CONFIG, TINY, limits))
    assert len(results) == count(CONFIG, TINY)
    for each in results:
        assert each.ours_us > 0
        assert each.of_copy == pytest.approx(each.bytes_per_second / 1e9)
        assert each.of_peak == pytest.approx(each.operations_per_second / 2e9)
    first = results[0]
    assert (first.name, first.rows) == ("qkv 320x192", 1)
    assert first.operations_per_second * first.ours_us / 1e6 == pytest.approx(2 * 320 * 192)
    moved = {
        each.dtype: each.bytes_per_second * each.ours_us / 1e6
        for each in results
        if (each.name, each.rows) == (first.name, 1)
    }
    assert moved["float32"] == pytest.approx(4 * (320 * 192 + 320 + 192))
    # Weights of bfloat16 may be compact.
    assert 0.68 * 2 * 320 * 192 < moved["bfloat16"] - 2 * (320 + 192) < 1.001 * 2 * 320 * 192


def test_without_the_native_module_there_is_less_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = count(CONFIG, TINY)
    monkeypatch.setattr(library, "layers", lambda _: None)
    names = {case.name.split()[0] for case in kernels._cases(CONFIG, TINY)}
    assert names == {"qkv", "output", "gate_up", "down", "head", "residual,", "silu_mul", "sampling"}
    assert count(CONFIG, TINY) == len(list(kernels._cases(CONFIG, TINY))) <= with_it


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench"], "the following arguments are required: BENCHMARK"),
        (["bench", "kernel"], "invalid choice: 'kernel'"),
        (["bench", "kernels", "--quik"], "unknown flag '--quik'; did you mean '--quick'?"),
        (["bench", "kernels", "--threads", "0"], "--threads must be at least 1, not 0"),
        (["bench", "kernels", "--threads", "x"], "--threads must be an integer, not 'x'"),
        (["bench", "kernels", "--model", "/no/model"], "there is no model folder '/no/model'"),
    ],
)
def test_wrong_usage_is_one_line(words: list[str], message: str, outrider_: Run) -> None:
    code, out, err = outrider_(*words)
    assert (code, out) == (2, "")
    assert err.startswith("outrider: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_ctrl_c_is_one_line(outrider_: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "measure", interrupt)
    assert outrider_("bench", "kernels") == (130, "", "outrider: interrupted\n")
