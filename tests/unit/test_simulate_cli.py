"""``outrider simulate`` as a stranger types it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outrider.cluster import simulated_table
from outrider.cluster.cli import output

Run = Callable[..., tuple[int, str, str]]
PAIR = ("--acceptance", "0.9,0.06", "--target-ms", "14", "--draft-ms", "1.2", "--round-trip-ms", "0.4")
SHORT = ("--tokens", "60")


@pytest.fixture
def small_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated_table, "ACCEPTANCES", ((0.65, 0.14),))
    monkeypatch.setattr(simulated_table, "RATIOS", ((4.0, 0.0), (8.0, 4.0)))
    monkeypatch.setattr(simulated_table, "SCREENING_TOKENS", 20)


@pytest.mark.usefixtures("small_table")
def test_the_table_as_text_and_as_json(outrider_: Run) -> None:
    code, text, err = outrider_("simulate", *SHORT)
    assert (code, err) == (0, "")
    lines = text.splitlines()
    assert lines[0] == "Speed-up over plain decoding"
    policies = ["never", "wait", "linger", "parallel", "serial", "pearl"]
    assert lines[2].split()[-9:] == ["c", "R", *policies, "formula"]
    assert [line.split()[:4] for line in lines[3:5]] == [[".65", ".14", "4", "0"], [".65", ".14", "8", "4"]]
    assert len({line.index("+-") for line in lines[3:5]}) == 1
    code, out, err = outrider_("simulate", *SHORT, "--json")
    assert (code, err) == (0, "")
    result: dict[str, Any] = json.loads(out)
    first, second = result["cells"]
    assert (result["tokens"], result["seed"], result["runs"]) == (60, 0, simulated_table.SEEDS)
    assert f"{first['parallel']['speed_up']:.2f} +-{first['parallel']['standard_error']:.2f}" in lines[3]
    assert first["pearl_formula"] == pytest.approx(1.595, abs=0.001)
    assert second["pearl_formula"] is None


@pytest.mark.usefixtures("small_table")
def test_a_terminal_gets_a_drawn_table_and_a_bar(outrider_: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(output, "SHOW_AFTER_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    code, out, err = outrider_("simulate", *SHORT)
    assert code == 0
    assert "│" in out
    assert "simulating" in err


def test_a_pair_of_one_s_own(outrider_: Run) -> None:
    code, text, err = outrider_("simulate", *PAIR, *SHORT)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in text.splitlines()[3:]] == ["plain", "parallel", "serial", "pearl"]
    _, out, _ = outrider_("simulate", *PAIR, *SHORT, "--json")
    plain, parallel, serial, _ = json.loads(out)["predictions"]
    assert plain["tokens_per_second"] == pytest.approx(1000 / 14)
    assert plain["speed_up"] == pytest.approx(1)
    assert plain["target_bubbles"] == pytest.approx(0)
    assert 1.5 < parallel["speed_up"] < 14 / 1.2
    assert parallel["overlap_ratio"] > 0.8 > serial["overlap_ratio"]
    assert serial["target_bubbles"] > 0.2 > parallel["target_bubbles"]
    assert parallel["tokens_per_second"] == pytest.approx(parallel["speed_up"] * 1000 / 14, rel=0.02)


def test_one_pipeline_and_its_shape(outrider_: Run) -> None:
    flags = ("--pipeline", "serial", "--num-speculative-tokens", "2", "--width", "1", "--json")
    _, out, _ = outrider_("simulate", *PAIR, *SHORT, *flags)
    plain, serial = json.loads(out)["predictions"]
    assert (plain["pipeline"], serial["pipeline"]) == ("plain", "serial")
    assert plain["target_rows"] == 1
    assert 1 < serial["target_rows"] <= 3


def test_a_curve_says_the_same_inline_and_in_a_file(outrider_: Run, tmp_path: Path) -> None:
    file = tmp_path / "curve.json"
    file.write_text("[14, 14.2, 14.9]")
    words = ("simulate", "--acceptance", "0.9", "--draft-ms", "1,1.1", *SHORT, "--json")
    _, inline, _ = outrider_(*words, "--target-curve", "14,14.2,14.9")
    _, filed, _ = outrider_(*words, "--target-curve-file", str(file))
    assert inline == filed != ""


def test_more_overhead_is_slower(outrider_: Run) -> None:
    words = ("simulate", *PAIR, *SHORT, "--pipeline", "parallel", "--json")
    rates = []
    for flag in ((), ("--target-overhead-ms", "2"), ("--speculation-overhead-ms", "3")):
        rates.append(json.loads(outrider_(*words, *flag)[1])["predictions"][1]["tokens_per_second"])
    assert rates[0] > rates[1] > rates[2]


TIMED = ["--acceptance", "0.9", "--target-ms", "14", "--draft-ms", "1"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--width", "4"], "--width needs --acceptance; the table has its own parameters"),
        (["--tokens", "0"], "--tokens must be from 1 to 1000000, not 0"),
        (["--acceptance", "0.9"], "--acceptance needs the target's time: give --target-ms, "),
        (["--acceptance", "0.9", "--target-ms", "14"], "needs the drafter's time: give --draft-ms"),
        (["--acceptance", "0.9,x"], "--acceptance must be numbers with commas between, not '0.9,x'"),
        (
            [*TIMED, "--acceptance", "0.9,0.2"],
            "--acceptance must be chances whose sum is at most 1, not [0.9, 0.2]",
        ),
        (["--target-ms", "0"], "--target-ms must be positive, not '0'"),
        (["--target-ms", "nan"], "--target-ms must be positive, not 'nan'"),
        (
            ["--target-ms", "1", "--target-curve", "1"],
            "--target-curve cannot be given together with --target-ms",
        ),
        (["--target-curve", "2,1"], "--target-curve must be positive times that do not decrease, not '2,1'"),
        (["--acceptance", "0.9", "--target-curve", "1", "--slope", "0.1"], "--slope 0.1 needs --target-ms"),
        (["--round-trip-ms", "-1"], "--round-trip-ms must be at least 0, not '-1'"),
        ([*TIMED, "--pipeline", "odd"], "--pipeline must be one of parallel, serial, pearl, not 'odd'"),
        ([*TIMED, "--width", "0"], "--width must be a positive integer, not 0"),
        ([*TIMED, "--contrast", "2"], "--contrast must be from 0 to 1 and leave"),
        ([*TIMED, "--correlation", "1"], "--correlation must be from 0 to below 1, not 1.0"),
        ([*TIMED, "--seed", "-1"], "--seed must be"),
        (["--seed", "-1"], "--seed must be"),
    ],
)
def test_wrong_values_are_one_line_that_names_them(flags: list[str], message: str, outrider_: Run) -> None:
    code, out, err = outrider_("simulate", *flags)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ("[1, 2", "is not JSON: "),
        ('{"a": 1}', "must be a list of milliseconds, not "),
        ('[1, "x"]', "must be numbers with commas between, not '1,x'"),
        ("[]", "must be numbers with commas between, not ''"),
        ("[3, 2]", "must be positive times that do not decrease, not '3,2'"),
    ],
)
def test_wrong_curve_files(text: str | None, message: str, outrider_: Run, tmp_path: Path) -> None:
    file = tmp_path / "curve.json"
    if text is not None:
        file.write_text(text)
    flags = ("--acceptance", "0.9", "--draft-ms", "1", "--target-curve-file", str(file))
    code, out, err = outrider_("simulate", *flags)
    assert (code, out) == (2, "")
    assert str(file) in err
    assert message in err
    assert err.count("\n") == 1


def test_a_wrong_line_is_refused_without_torch() -> None:
    code = (
        "import sys; from outrider.cluster.cli.main import main; "
        "code = main(['simulate', '--target-ms', 'x']); sys.exit(code + ('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 2
