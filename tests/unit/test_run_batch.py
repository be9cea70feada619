"""``outrider run-batch`` as it is typed: the engine's own tokens, and processes that are killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from instruments.batches import CHAT, answers, row, tokens, write_lines
from instruments.processes import INTERRUPTED, until

from outrider import LLM, SamplingParams
from outrider.speculation.errors import OutOfBlocksError

Run = Callable[..., tuple[int, str, str]]
NGRAM = ("-sc", '{"method": "ngram"}')


@pytest.fixture(scope="module")
def folder(make_model_folder: Callable[..., Path]) -> Path:
    return make_model_folder("llama")


@pytest.fixture
def template(tmp_path: Path) -> str:
    path = tmp_path / "template.jinja"
    path.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    return str(path)


def sampled_rows(count: int, max_tokens: int = 24) -> list[object]:
    return [
        row(
            f"row-{number}",
            n=1 + number % 2,
            max_tokens=max_tokens,
            temperature=0.2 * (number % 4),
            ignore_eos=True,
        )
        for number in range(count)
    ]


def test_the_tokens_are_the_engine_s(outrider_: Run, folder: Path, template: str, tmp_path: Path) -> None:
    chat = row("chat", CHAT, max_tokens=8, seed=5, temperature=0.5)
    seeded = row("seeded", max_tokens=8, seed=5, temperature=0.5, n=2, prompt=[5, 6, 7])
    source = str(write_lines(tmp_path / "in", [*sampled_rows(12), chat, seeded, row("bad", top_p=3)]))
    words = ("run-batch", "-i", source, "--model", str(folder), "--chat-template", template)
    out, plain, report = (str(tmp_path / name) for name in ("out", "plain", "report"))
    code, printed, said = outrider_(*words, "-o", out, *NGRAM, "--report", report)
    assert (code, printed) == (0, "")
    assert said.startswith("outrider: 15 rows, 1 failed; ")
    code, _, said = outrider_(*words, "-o", plain, "--no-speculation", "--max-num-seqs", "3", "--keep-order")
    assert code == 0, said
    assert tokens(Path(out)) == tokens(Path(plain))
    assert [each["custom_id"] for each in answers(Path(plain))][-3:] == ["chat", "seeded", "bad"]
    with LLM(str(folder)) as llm:
        params = SamplingParams(max_tokens=8, seed=5, temperature=0.5, n=2)
        (expected,) = llm.generate([[5, 6, 7]], params)
    assert tokens(Path(out))["seeded"] == [each.token_ids for each in expected.outputs]
    figures = json.loads(Path(report).read_text())
    assert (figures["rows"], figures["failed"], figures["rows_of_earlier_runs"]) == (15, 1, 0)
    assert figures["output_tokens"] == sum(len(ids) for each in tokens(Path(out)).values() for ids in each)
    assert figures["target_device_seconds"] > 0
    assert figures["mean_acceptance_length"] >= 1


WRONG: list[tuple[tuple[str, ...], str]] = [
    (("--seed", "-1"), "--seed must be within [0, 2**64), not -1"),
    (("--max-errors", "-1"), "--max-errors must be at least 0, not -1"),
    (("--input", "missing"), "input 'missing' cannot be read: No such file or directory"),
    (("--input", "/dev/null"), "input '/dev/null' must be a regular file"),
    (("--output", "no/where"), "output 'no/where' cannot be written: No such file or directory"),
    (("--report", "no/where"), "report 'no/where' cannot be written: No such file or directory"),
    (("--output", "{source}"), "--output must be another file than the input"),
    (("--chat-template", "missing"), "the chat template 'missing' cannot be read"),
    (("missing.yaml",), "there is no file 'missing.yaml'"),
    (("{cluster}", "--dtype", "float32"), "--dtype is for generating in this process"),
    (("{cluster}", "--pipeline", "serial"), "--pipeline is for generating in this process"),
    (("--keep-ordr",), "did you mean '--keep-order'?"),
]


@pytest.mark.parametrize(("words", "problem"), WRONG)
def test_what_cannot_be_is_refused_in_one_line(
    words: tuple[str, ...], problem: str, outrider_: Run, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in", sampled_rows(1))
    (tmp_path / "cluster.yaml").write_text("name: x\n")
    places = {"source": source, "cluster": tmp_path / "cluster.yaml"}
    filled = [word.format(**places) for word in words]
    code, _, said = outrider_("run-batch", "-i", str(source), "-o", str(tmp_path / "out"), *filled)
    assert code == 2
    assert problem in said
    assert said.count("\n") == 1


def test_a_changed_job_is_refused_before_a_model_is_loaded(
    outrider_: Run, folder: Path, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in", sampled_rows(2))
    words = ("run-batch", "-i", str(source), "-o", str(tmp_path / "out"))
    assert outrider_(*words, "--model", str(folder))[0] == 0
    code, _, said = outrider_(*words, "--model", str(folder), "--dtype", "float64")
    assert code == 2
    assert "dtype was float32 and is float64 now; --overwrite begins anew" in said
    code, _, said = outrider_(*words, "--model", "no/such/model", "--seed", "1")
    assert code == 2
    assert "seed was 0 and is 1 now" in said


def started(words: list[str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "outrider.cluster.cli.main", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def end_after(process: "subprocess.Popen[str]", ending: int, out: Path, lines: int) -> str:
    """Ends it once so many lines are written; what it said."""
    assert until(lambda: lines_of(out) >= lines or process.poll() is not None, 240, pause=0.001)
    os.kill(process.pid, ending)
    return process.communicate(timeout=60)[1]


def test_a_killed_job_goes_on_with_the_same_tokens(outrider_: Run, folder: Path, tmp_path: Path) -> None:
    """Interrupted once, killed twice, each time somewhere; then it runs to its end."""
    count = 150
    source = write_lines(tmp_path / "in", sampled_rows(count, 48))
    out, whole = tmp_path / "out", tmp_path / "whole"
    words = ["run-batch", "-i", str(source), "--model", str(folder), *NGRAM]
    rng, before = np.random.default_rng(), 0
    for ending in (signal.SIGINT, signal.SIGKILL, signal.SIGKILL):
        process = started([*words, "-o", str(out)])
        enough = before + int(rng.integers(1, 25))
        said = end_after(process, ending, out, enough)
        before = lines_of(out)
        assert process.returncode in (INTERRUPTED if ending == signal.SIGINT else (-signal.SIGKILL,)), said
        assert enough <= before < count
        if ending == signal.SIGINT:
            assert said.splitlines()[-1] == "outrider: the same command goes on from here"
    code, _, said = outrider_(*words, "-o", str(out))
    assert code == 0
    assert f"{count} rows ({before} of them earlier), 0 failed" in said
    outrider_(*words, "-o", str(whole))
    assert len(answers(out)) == len(answers(whole)) == count
    assert tokens(out) == tokens(whole)


def test_one_that_fails_ends_no_other(folder: Path) -> None:
    """And in order, those before it are given first."""
    with LLM(str(folder), max_num_seqs=2) as llm:
        params = [SamplingParams(temperature=0, max_tokens=most, ignore_eos=True) for most in (2, 62, 2)]
        requests = [llm.prepare([7, 8], each)[1][0] for each in params]
        engine_start = llm.engine.start

        def start(request: Any) -> Any:
            if request.params.max_tokens == 62:
                raise OutOfBlocksError("no room")
            return engine_start(request)

        llm.engine.start = start  # type: ignore[method-assign]
        results = dict(llm.complete_unordered(requests))
        assert isinstance(results.pop(requests[1]), OutOfBlocksError)
        assert [len(results[each].token_ids) for each in (requests[0], requests[2])] == [2, 2]
        in_order = llm.complete_all(requests)
        assert len(next(in_order).token_ids) == 2
        with pytest.raises(OutOfBlocksError):
            next(in_order)
