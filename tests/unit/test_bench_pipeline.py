"""``outrider bench pipeline`` as a stranger types it, and what it makes of measurements."""

import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from outrider.cluster.bench import pipeline, ways
from outrider.cluster.bench.bars import Bar, bar_chart
from outrider.cluster.bench.pipeline import Setting, report
from outrider.cluster.bench.prediction import predict
from outrider.cluster.bench.report import median_ratio, repeated_share
from outrider.cluster.bench.ways import ALL_CORES, PIPELINES, PLAIN, Way
from outrider.cluster.cli.main import main
from outrider.cluster.delay_relay import DelayRelay
from outrider.cluster.simulator import Text
from outrider.models.demo import pair
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.pipelines.registry import PIPELINES as REGISTERED
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.statistics import SpeculationStatistics
from outrider.speculation.step_cost import StepCostModel

Run = Callable[..., tuple[int, str, str]]
SETTING = Setting(temperature=0.0, delay=0.0, round_trip=0.0)


def test_every_way_gives_the_same_tokens(
    outrider_: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "WARM_UP", 1)
    delays: list[float] = []

    def relay(address: str, one_way: float) -> DelayRelay:
        delays.append(one_way)
        return DelayRelay(address, one_way)

    monkeypatch.setattr(ways, "DelayRelay", relay)
    cores = os.sched_getaffinity(0)
    plot, trace = tmp_path / "plot.svg", tmp_path / "trace.json"
    words = ["--quick", "--target", str(pair.TARGET), "--prompts", "1", "--tokens", "8"]
    words += ["--temperatures", "1", "--delays", "0", "0.5", "--plot", str(plot), "--trace", str(trace)]
    code, out, err = outrider_("bench", "pipeline", *words)
    assert err == ""
    assert code == 0
    *table, last = out.splitlines()
    assert [line.split()[0] for line in table if line][1:6] == ["way", "all", *PIPELINES]
    assert "…" not in out
    result = json.loads(last)
    assert (result["tokens"], result["prompts"], result["parameters"]) == (8, 1, None)
    near, far = result["settings"]
    assert (near["delay"], near["round_trip_ms"], far["delay"]) == (0.0, 0.0, 0.5)
    (one_way,) = delays
    assert far["round_trip_ms"] == pytest.approx(2e3 * one_way, abs=1e-3)
    assert one_way > 0
    for setting in (near, far):
        assert setting["identical"]
        assert list(setting["ways"]) == [ALL_CORES, *PIPELINES]
        for way in setting["ways"].values():
            assert way["identical_texts"] == 1
            assert way["over_plain"]["pairs"] == 1
        assert setting["ways"]["parallel"]["growth_nodes"] > 0
        assert setting["ways"]["parallel"]["simulated"] > 0
        told = setting["ways"]["parallel"]["told_the_simulator"]
        assert told["round_trip_ms"] >= setting["round_trip_ms"]
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")
    assert json.loads(trace.read_text())["traceEvents"]
    assert os.sched_getaffinity(0) == cores


def test_every_pipeline_is_a_way() -> None:
    assert set(PIPELINES) == set(REGISTERED)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quik"], "unknown flag '--quik'; did you mean '--quick'?"),
        (["--prompts", "0"], "--prompts must be at least 1, not 0"),
        (["--prompts", "1000000"], "--prompts must be fewer, not 1000000"),
        (["--tokens", "x"], "--tokens must be an integer, not 'x'"),
        (["--delays", "-1"], "--delays must be at least 0, not -1.0"),
        (["--delays", "inf"], "--delays must be at least 0, not inf"),
        (["--temperatures", "nan"], "--temperatures must be at least 0, not nan"),
        (["--parameters", "many"], "'many' is no number of parameters such as 120M or 1.5B"),
        (["--parameters", "1M"], "parameters=1000000 is below the source's"),
        (["--target", "/no/model"], "there is no model folder '/no/model'"),
        (["--plot", "/no/folder/plot.svg"], "the plot '/no/folder/plot.svg' cannot be written"),
        (["--trace", "/no/folder/trace", "--target", str(pair.TARGET)], "'/no/folder/trace'"),
    ],
)
def test_wrong_usage_is_one_line(words: list[str], message: str, outrider_: Run) -> None:
    code, out, err = outrider_("bench", "pipeline", *words)
    assert (code, out) == (2, "")
    assert err.startswith("outrider: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_what_a_target_cannot_be_is_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    """By this process; the one for all cores meets with it as well."""
    assert main(["bench", "pipeline", "--target", str(pair.TARGET), "--dtype", "int4"]) == 2
    err = capfd.readouterr().err
    assert "dtype" in err
    assert err.count("\n") == 1


def test_a_process_that_ended_early_is_told(tmp_path: Path) -> None:
    every_core = ways.AllCores(tmp_path / "no model", "float32", 1)
    with pytest.raises(ways.WorkerError, match="ended with 0"):
        every_core.await_start()
    every_core.close()


@pytest.mark.parametrize(
    ("tokens", "share"),
    [([], 0.0), (range(7), 0.0), (range(20), 0.0), ([1] * 9, 0.5), ([*range(8), *range(8)], 1 / 9)],
)
def test_share_of_repeated_runs(tokens: list[int], share: float) -> None:
    assert repeated_share(list(tokens)) == pytest.approx(share)


def test_a_ratio_is_of_pairs() -> None:
    ratio = median_ratio([2.0, 30.0, 400.0], [1.0, 10.0, 100.0])
    assert (ratio["median"], ratio["low"], ratio["high"], ratio["pairs"]) == (3.0, 2.0, 4.0, 3)


def test_the_plot_is_xml_and_its_bars_have_their_heights() -> None:
    bars = [Bar(value=2.0, low=1.5, high=2.5), Bar(value=1.0, low=0.9, high=1.1)]
    root = ElementTree.fromstring(bar_chart("a < b & c", ["one", "two"], [("T = 0", bars), ("T = 1", bars)]))
    rects = [each for each in root.iter("{http://www.w3.org/2000/svg}rect") if len(each)]
    heights = [float(each.attrib["height"]) for each in rects]
    assert len(heights) == 4
    assert heights[0] == pytest.approx(2 * heights[1], rel=0.01)
    assert [each[0].text for each in rects[:2]] == ["2.00 (1.50 to 2.50)", "1.00 (0.90 to 1.10)"]
    words = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a < b & c", "one", "two", "T = 0", "T = 1"} <= set(words)


def way(seconds: float, texts: list[list[int]], **counts: float) -> Way:
    """Decoded texts of so many seconds each; a step of the target takes 10 ms."""
    tokens = sum(map(len, texts))
    stats = SpeculationStatistics(
        num_output_tokens=tokens, target_steps=tokens, target_rows=tokens, target_seconds=0.01 * tokens
    )
    for name, value in counts.items():
        setattr(stats, name, value)
    costs = CostEstimates(StepCostModel(np.linspace(0.01, 0.02, 64)))
    return Way(
        run=lambda *_: ([], stats), costs=costs, seconds=[seconds] * len(texts), texts=texts, stats=stats
    )


def measured_ways(texts: list[list[int]]) -> dict[str, Way]:
    """Pipelines twice as fast as plain decoding; the drafter of ``pearl`` took no step."""
    drafting = {"draft_steps": 20, "draft_seconds": 0.02}
    return {
        PLAIN: way(0.4, texts),
        ALL_CORES: way(0.8, texts),
        **{name: way(0.2, texts, **({} if name == "pearl" else drafting)) for name in PIPELINES},
    }


def predicted(measured: dict[str, Way], truth: int, round_trip: float = 0.0):
    texts = [Text(np.full(len(text), truth), np.tile([0.8, 0.1], (len(text), 1)))
             for text in measured[PLAIN].texts]  # fmt: skip
    drafted = {name: measured[name] for name in PIPELINES}
    return predict(measured[PLAIN], drafted, texts, shape=TreeShape(), round_trip=round_trip)


def test_texts_that_loop_are_told_apart() -> None:
    measured = measured_ways([[1] * 40, list(range(40))])
    measured["serial"].seconds[0] = 0.1
    result = report(measured, predicted(measured, 0), SETTING)
    assert (result["texts"], result["looping_texts"]) == (2, 1)
    assert result["repeated_share"] == pytest.approx(0.5 * 32 / 33, abs=1e-3)
    serial = result["ways"]["serial"]
    assert serial["over_plain"]["median"] == 3.0
    assert (serial["over_plain_not_looping"]["median"], serial["over_plain_not_looping"]["pairs"]) == (2.0, 1)
    only_loops = measured_ways([[1] * 40])
    result = report(only_loops, predicted(only_loops, 0), SETTING)
    assert result["ways"]["serial"]["over_plain_not_looping"] is None


def test_a_token_that_differs_is_told() -> None:
    measured = measured_ways([list(range(40)), list(range(40))])
    measured["parallel"].texts = [list(range(40)), [*range(39), 7]]
    result = report(measured, predicted(measured, 0), SETTING)
    assert not result["identical"]
    assert [each["identical_texts"] for each in result["ways"].values()] == [2, 2, 2, 1]


def test_the_simulator_is_told_what_was_measured() -> None:
    measured = measured_ways([list(range(40))] * 2)
    good, bad = predicted(measured, 0), predicted(measured, 2)
    assert set(good.speed_up) == {"serial", "parallel"}
    assert good.costs["parallel"].draft == (0.001,)
    assert good.costs["parallel"].target[0] == pytest.approx(0.01)
    # 0.8 s for 80 steps of 10 ms plainly: nothing between them.
    assert good.costs["parallel"].target_overhead == 0.0
    assert good.speed_up["parallel"] > 2.0
    assert bad.speed_up["parallel"] < 1.1
    assert predicted(measured, 0, 0.02).speed_up["serial"] < good.speed_up["serial"]
    result = report(measured, good, SETTING)
    assert result["ways"]["parallel"]["c"] == 10.0
    assert "simulated" not in result["ways"]["pearl"]
    over = result["ways"]["parallel"]["measured_over_simulated"]
    assert over == pytest.approx(2.0 / good.speed_up["parallel"], abs=1e-3)
