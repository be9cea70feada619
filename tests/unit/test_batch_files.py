"""Batch files: each line is answered once, whatever is wrong with it, and however often the job is killed."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from instruments.batches import (
    CHAT,
    COMPLETIONS,
    MODEL,
    POISON,
    Echo,
    Killed,
    answers,
    row,
    run_job,
    tokens,
    write_lines,
)

from outrider.cluster.batch_files import job
from outrider.cluster.batch_files.job import TooManyErrorsError
from outrider.cluster.batch_files.lines import Question, parse
from outrider.cluster.batch_files.results import ResultFile
from outrider.cluster.sampled_digest import sampled_digest
from outrider.speculation.errors import InvalidConfigError

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def folder(tiny_tokenizer_folder: Path) -> Path:
    return tiny_tokenizer_folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def rows(count: int) -> list[object]:
    """Of one to three choices; some bring a seed, some cannot be served."""
    made: list[object] = []
    for number in range(count):
        body: dict[str, Any] = {"n": 1 + number % 3}
        if number % 5 == 0:
            body["seed"] = number
        if number % 11 == 10:
            body["temperature"] = "hot"
        if number % 17 == 16:
            body["prompt"] = [5, POISON]
        made.append("{" if number % 23 == 22 else row(f"row-{number}", **body))
    return made


REFUSED: list[tuple[object, str | None, int | None, str, str]] = [
    # What is asked; custom_id, status, code and words of the answer.
    ("{bad", None, None, "invalid_json", "the line is not JSON"),
    ("[" * 100_000, None, None, "invalid_json", "the line is not JSON"),
    ("[1]", None, None, "invalid_json", "the line must be an object"),
    ({"method": "POST"}, None, None, "invalid_custom_id", "custom_id must be a string, not None"),
    ({**row("x"), "custom_id": 7}, None, None, "invalid_custom_id", "custom_id must be a string, not 7"),
    ({**row("x"), "custom_id": ""}, None, None, "invalid_custom_id", "custom_id must be a string, not ''"),
    ({**row("x"), "method": "GET"}, "x", None, "invalid_method", "method must be 'POST', not 'GET'"),
    ({**row("x"), "url": "/v1/embeddings"}, "x", None, "invalid_url", "not '/v1/embeddings'"),
    ({**row("x"), "url": ["a" * 99]}, "x", None, "invalid_url", "aaa..."),
    (row("first"), "first", None, "duplicate_custom_id", "custom_id 'first' stands in an earlier line"),
    ({**row("x"), "body": None}, "x", 400, "400", "the body: should be an object"),
    ({**row("x"), "body": {}}, "x", 400, "400", "prompt: Field required"),
    (row("x", temperature="hot"), "x", 400, "400", "temperature: should be a valid number"),
    (row("x", top_p=7), "x", 400, "400", "top_p must be within (0, 1]"),
    (row("x", stream=True), "x", 400, "400", "stream must be false in a batch file, not true"),
    (row("x", return_draft_tokens=True), "x", 400, "400", "return_draft_tokens must be false in a batch"),
    (row("x", tools=[{}]), "x", 400, "unsupported_parameter", "tools is not supported"),
    (row("x", model="gpt"), "x", 404, "model_not_found", "model must be one of 'tiny', not 'gpt'"),
    (row("x", prompt=[1] * 64), "x", 400, "400", "leaves no room in a context of 64"),
    (row("x", prompt="\ud800"), "x", 400, "400", "the prompt is not valid text"),
    (row("x", prompt=[5, POISON]), "x", 500, "500", "it does not fit"),
    (row("x", CHAT, messages=[{"role": 1}]), "x", 400, "400", "messages[0].role must be a string"),
]


@pytest.mark.parametrize(("line", "custom_id", "status", "code", "words"), REFUSED)
def test_a_row_that_cannot_be_served_ends_no_other(
    line: object, custom_id: str | None, status: int | None, code: str, words: str, folder: Path, output: Path
) -> None:
    source = write_lines(output.with_name("in"), [row("first"), line, row("last")])
    report = run_job(Echo(folder), source, output)
    assert (report.rows, report.failed) == (3, 1)
    (bad,) = [each for each in answers(output) if each["error"] is not None]
    assert bad["custom_id"] == custom_id
    assert bad["error"]["code"] == code
    assert words in bad["error"]["message"]
    if status is None:
        assert bad["response"] is None
        assert bad["error"]["message"].startswith("line 2: ")
    else:
        assert bad["response"]["status_code"] == status
        assert bad["response"]["body"]["error"]["message"] == bad["error"]["message"]
    assert set(tokens(output)) == {"first", "last"}


def test_answers_have_openai_s_form(folder: Path, output: Path) -> None:
    chat = row("b", CHAT, max_tokens=4)
    lines = ["\ufeff" + json.dumps(row("a", n=2, model=MODEL)), "", "  ", json.dumps(chat) + "\r"]
    run_job(Echo(folder), write_lines(output.with_name("in"), lines), output, chat_template=TEMPLATE)
    text, conversation = sorted(answers(output), key=lambda each: str(each["custom_id"]))
    assert set(text) == {"id", "custom_id", "response", "error"}
    assert set(text["response"]) == {"status_code", "request_id", "body"}
    assert text["error"] is None
    assert text["response"]["status_code"] == 200
    assert text["response"]["body"]["object"] == "text_completion"
    assert [each["index"] for each in text["response"]["body"]["choices"]] == [0, 1]
    assert text["response"]["body"]["usage"]["completion_tokens"] == 8
    assert conversation["response"]["body"]["object"] == "chat.completion"
    assert conversation["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert text["id"].endswith("_1")
    assert conversation["id"].endswith("_4")


def test_a_row_s_seed_is_its_own(folder: Path, output: Path) -> None:
    lines = [row("a"), row("b"), row("c", seed=3), row("d", seed=3), row("\ud800", prompt="x")]
    source = write_lines(output.with_name("in"), lines)
    run_job(Echo(folder), source, output)
    first = tokens(output)
    assert first["a"] != first["b"]
    assert first["c"] == first["d"]
    run_job(Echo(folder, shuffle=1), write_lines(source, lines[::-1]), output, overwrite=True)
    assert tokens(output) == first
    run_job(Echo(folder), source, output, overwrite=True, seed=1)
    other = tokens(output)
    assert other["c"] == first["c"]
    assert not [name for name in ("a", "b", "\ud800") if other[name] == first[name]]
    question = Question(custom_id="a", url=COMPLETIONS, given={})
    assert all(0 <= question.seed(seed) < 2**63 for seed in (0, 1, 2**64 - 1))


@pytest.mark.parametrize("keep_order", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_every_row_is_answered_once_however_often_the_job_dies(
    seed: int, keep_order: bool, folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two answers, and in the middle of writing one."""
    source = write_lines(output.with_name("in"), rows(120))
    whole = output.with_name("whole")
    run_job(Echo(folder), source, whole)
    rng = np.random.default_rng(seed)
    write, left = os.write, 0

    def torn(descriptor: int, data: memoryview) -> int:
        """Some bytes of the last write reach the file."""
        nonlocal left
        left -= 1
        if left:
            return write(descriptor, data)
        write(descriptor, data[: int(rng.integers(len(data)))])
        raise Killed

    deaths = 0
    for attempt in range(100):
        left = int(rng.integers(1, 40))
        monkeypatch.setattr(os, "write", torn)
        try:
            report = run_job(
                Echo(folder, shuffle=attempt, dies_after=int(rng.integers(60))),
                source,
                output,
                keep_order=keep_order,
            )
        except Killed:
            deaths += 1
            continue
        finally:
            monkeypatch.undo()
        break
    assert deaths > 1
    assert tokens(output) == tokens(whole)
    lines = [int(each["id"].rpartition("_")[2]) for each in answers(output)]
    assert sorted(lines) == list(range(1, 121))
    assert not keep_order or lines == sorted(lines)
    assert report.rows == 120
    failed = sum(each["error"] is not None for each in answers(whole))
    assert report.failed == failed > 10
    before = output.read_bytes()
    again = run_job(Echo(folder, dies_after=0), source, output, keep_order=keep_order)
    assert (again.rows, again.earlier, again.failed) == (120, 120, failed)
    assert output.read_bytes() == before


@pytest.mark.parametrize("body", [{}, {"temperature": "hot"}], ids=["an answer", "an error"])
def test_a_line_cut_anywhere_is_answered_again(body: dict[str, Any], folder: Path, output: Path) -> None:
    source = write_lines(output.with_name("in"), [*rows(4), row("last", **body)])
    run_job(Echo(folder, window=1), source, output)
    whole, expected = output.read_bytes(), tokens(output)
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start, len(whole)):
        output.write_bytes(whole[:end])
        report = run_job(Echo(folder), source, output)
        assert (report.rows, report.earlier) == (5, 4)
        assert output.read_bytes()[:start] == whole[:start]
        assert len(answers(output)) == 5
        assert tokens(output) == expected


def test_input_is_read_as_there_is_room(folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lines(output.with_name("in"), [row(f"row-{number}", n=2) for number in range(500)])
    read = 0

    def counted(line: bytes) -> Question:
        nonlocal read
        read += 1
        return parse(line)

    ahead: list[int] = []
    monkeypatch.setattr(job, "parse", counted)
    report = run_job(
        Echo(folder, window=8), source, output, on_answer=lambda so_far: ahead.append(read - so_far.rows)
    )
    assert report.rows == len(ahead) == 500
    # Eight requests are those of four rows, or of three and of parts of two.
    assert max(ahead) <= 8


def test_order_is_kept(folder: Path, output: Path) -> None:
    source = write_lines(output.with_name("in"), rows(60))
    run_job(Echo(folder), source, output)
    lines = [int(each["id"].rpartition("_")[2]) for each in answers(output)]
    assert lines != sorted(lines)
    run_job(Echo(folder), source, output, keep_order=True, overwrite=True)
    assert [int(each["id"].rpartition("_")[2]) for each in answers(output)] == list(range(1, 61))


def test_too_many_errors_end_the_job(folder: Path, output: Path) -> None:
    lines = [row(f"row-{number}", temperature="hot" if number % 2 else 1) for number in range(20)]
    source = write_lines(output.with_name("in"), lines)
    with pytest.raises(TooManyErrorsError, match="4 rows have failed, more than 3"):
        run_job(Echo(folder), source, output, max_errors=3)
    assert sum(each["error"] is not None for each in answers(output)) == 4
    assert run_job(Echo(folder), source, output, max_errors=10).rows == 20


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"seed": 1}, "seed was 0 and is 1 now"),
    ({"keep_order": True}, "keep_order was False and is True now"),
    ({"chat_template": TEMPLATE}, "chat_template was None"),
    ({"device": "cuda"}, "device was cpu and is cuda now"),
    ({"dtype": "bfloat16"}, "dtype was float32 and is bfloat16 now"),
    ({"numerics": "fast"}, "numerics was canonical and is fast now"),
    ({"weights": "1"}, "the hash of the weights was 0 and is 1 now"),
    ({"max_model_len": 63}, "max_model_len was 64 and is 63 now"),
    ({"tensor_parallel_size": 2}, "tensor_parallel_size was 1 and is 2 now"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_a_changed_job_is_not_resumed(change: dict[str, Any], words: str, folder: Path, output: Path) -> None:
    source = write_lines(output.with_name("in"), rows(10))
    with pytest.raises(Killed):
        run_job(Echo(folder, dies_after=5), source, output)
    before = output.read_bytes()
    options = {
        name: value for name, value in change.items() if name in ("seed", "keep_order", "chat_template")
    }
    card = {name: value for name, value in change.items() if name not in options}
    with pytest.raises(InvalidConfigError) as refused:
        run_job(Echo(folder, card_changes=card), source, output, **options)
    assert words in str(refused.value)
    assert "--overwrite begins anew" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert output.read_bytes() == before
    assert run_job(Echo(folder, card_changes=card), source, output, overwrite=True, **options).rows == 10
    # What speeds a job up may change.
    assert run_job(Echo(folder, card_changes={**card, "drafting": "x"}), source, output, **options).rows == 10


def test_changed_input_is_not_resumed(folder: Path, output: Path) -> None:
    lines = rows(10)
    source = write_lines(output.with_name("in"), lines)
    run_job(Echo(folder), source, output)
    for changed in ([*lines, row("more")], [row("less"), *lines[1:]]):
        with pytest.raises(InvalidConfigError, match="the input was"):
            run_job(Echo(folder), write_lines(source, changed), output)


def test_foreign_outputs_are_left_alone(folder: Path, output: Path) -> None:
    source, state = write_lines(output.with_name("in"), rows(10)), output.with_name("out.jsonl.state")
    output.write_text("precious\n")
    with pytest.raises(InvalidConfigError, match=r"there is no out\.jsonl\.state beside it; --overwrite"):
        run_job(Echo(folder), source, output)
    for text in ("", "{", "[]", "{}", '{"job": 1, "settings": 2}'):
        state.write_text(text)
        with pytest.raises(InvalidConfigError, match=r"out\.jsonl\.state cannot be read"):
            run_job(Echo(folder), source, output)
    assert output.read_text() == "precious\n"
    run_job(Echo(folder), source, output, overwrite=True)
    text = output.read_text()
    for line in (
        "precious\n",
        "{}\n",
        '{"id": "batch_req_x_1", "error": null}\n',
        text.splitlines()[0] + ",\n",
    ):
        output.write_text(text + line)
        with pytest.raises(InvalidConfigError, match="its line 11 is no answer of this job"):
            run_job(Echo(folder), source, output)
        assert output.read_text() == text + line


def test_empty_output_is_new(folder: Path, output: Path) -> None:
    """Whatever an earlier state says of it: a job may die before its first answer."""
    source = write_lines(output.with_name("in"), rows(10))
    output.touch()
    with pytest.raises(Killed):
        run_job(Echo(folder, dies_after=0), source, output)
    assert run_job(Echo(folder), source, output, seed=5).rows == 10


def test_one_process_at_a_time(folder: Path, output: Path, tmp_path: Path) -> None:
    source = write_lines(output.with_name("in"), rows(10))
    first = ResultFile(output, overwrite=False)
    with pytest.raises(InvalidConfigError, match="is in use by another process"):
        run_job(Echo(folder), source, output)
    first.close()
    with pytest.raises(InvalidConfigError, match="cannot be written: Is a directory"):
        ResultFile(tmp_path, overwrite=False)
    with pytest.raises(InvalidConfigError, match="must be a regular file"):
        ResultFile(Path("/dev/null"), overwrite=False)


def test_digests_tell_files_apart(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for size in (0, 1, 20_000, 1 << 20, (1 << 20) + 1, 5_000_000):
        data = bytearray(np.random.default_rng(size).bytes(size))
        path.write_bytes(data)
        digest = sampled_digest(path)
        assert sampled_digest(path) == digest
        path.write_bytes(data + b"x")
        assert sampled_digest(path) != digest
        # Up to a MiB every byte counts, beyond at least the first and the last.
        places = [0, size - 1] + ([size // 2, size // 3] if size <= 1 << 20 else [])
        for place in places if size else ():
            data[place] ^= 1
            path.write_bytes(data)
            assert sampled_digest(path) != digest
            data[place] ^= 1
