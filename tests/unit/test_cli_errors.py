"""Wrong command lines and failures: one line on standard error, and the exit codes."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from outrider.cluster.cli import generate

Run = Callable[..., tuple[int, str, str]]


WRONG: list[tuple[list[str], str]] = [
    ([], "a command is missing: generate"),
    (["generat"], "unknown command 'generat'; did you mean 'generate'?"),
    (["--versoin"], "unknown flag '--versoin'; did you mean '--version'?"),
    (["--target=x", "generate"], "--target belongs after its command: outrider generate --target"),
    (["generate", "--temprature", "1"], "unknown flag '--temprature'; did you mean '--temperature'?"),
    (["generate", "--max-token=3"], "unknown flag '--max-token'; did you mean '--max-tokens'?"),
    (["generate", "-s", "{}"], "unknown flag '-s'; did you mean '-sc'?"),
    (["generate", "hello"], "there is no file 'hello'; a text goes after --prompt"),
    (["generate", "--prompt", "--x"], "--prompt needs a value (if it begins with '-', write --prompt=VALUE)"),
    (
        ["generate", "--prompt", "a", "--prompt-file", "b"],
        "--prompt-file cannot be given together with --prompt",
    ),
    (["generate", "--prompt", ""], "--prompt must not be empty"),
    (["generate", "--prompt", "\udcff"], "--prompt must be UTF-8, and '\\udcff' is not"),
    (["generate", "--prompt-file", "/no/such"], "'/no/such' cannot be read: No such file or directory"),
    (["generate", "--prompt-file", "/"], "'/' cannot be read: Is a directory"),
    (["generate", "--prompt-file", "a\0b"], "'a\\x00b' cannot be read"),
    (["generate", "--prompt", "a", "--temperature", "-1"], "--temperature must be at least 0, not -1.0"),
    (["generate", "--prompt", "a", "--temperature", "hot"], "--temperature must be a number, not 'hot'"),
    (["generate", "--prompt", "a", "--max-tokens", "0"], "--max-tokens must be at least 1, not 0"),
    (["generate", "--prompt", "a", "--max-tokens", "1.5"], "--max-tokens must be an integer, not '1.5'"),
    (["generate", "--prompt", "a", "--top-p", "nan"], "--top-p must be a finite number, not nan"),
    (["generate", "--prompt", "a", "--seed", "-1"], "--seed must be None or within [0, 2**64), not -1"),
    (["generate", "--prompt", "a", "--n", "0"], "--n must be at least 1, not 0"),
    (["generate", "--prompt", "a", "--stop", ""], "--stop must be non-empty strings, not ''"),
    (["generate", "--prompt", "a", "--logprobs", "1"], "--logprobs needs --json, which has a field"),
    (["generate", "--prompt", "a", "--prompt-logprobs", "1"], "--prompt-logprobs needs --json, which"),
    (
        ["generate", "--prompt", "a", "--json", "--prompt-logprobs", "21"],
        "--prompt-logprobs must be None or within [0, 20], not 21",
    ),
    (["generate", "--prompt", "a", "--threads", "0"], "--threads must be at least 1, not 0"),
    (["generate", "--prompt", "a", "-tp", "0"], "--tensor-parallel-size must be a positive integer, not 0"),
    (["generate", "--prompt", "a", "-tp", "4"], "tensor_parallel_size 4 does not divide the model's 6"),
    (["generate", "--prompt", "a", "--numerics", "odd"], "--numerics must be canonical or fast, not 'odd'"),
    (["generate", "--prompt", "a", "--target", "/no/model"], "there is no model folder '/no/model'"),
    (
        ["generate", "--prompt", "a", "--quantization", "int8"],
        "--quantization must be a drafter's, not 'int8': the target's numbers",
    ),
    (
        ["generate", "--prompt", "a", "-sc", '{"model": "x", "quantization": "fp8"}'],
        "quantization must be one of int8, not 'fp8'",
    ),
    (["draft-worker", "--quantization", "fp8"], "--quantization must be int8, not 'fp8'"),
    (["generate", "--prompt", "a", "-sc", "{"], "must be JSON, and '{' is not"),
    (["generate", "--prompt", "a", "-sc", "[1]"], "must be a JSON object such as '{\"key\": 1}', not '[1]'"),
    (["generate", "--prompt", "a", "-sc", '{"modle": 1}'], "unknown key 'modle'; did you mean 'model'?"),
    (
        ["generate", "--prompt", "a", "--num-speculative-tokens", "0"],
        "--num-speculative-tokens must be a positive integer, not 0",
    ),
    (
        ["generate", "--prompt", "a", "--target", "x", "--num-speculative-tokens", "4"],
        "--num-speculative-tokens needs something that drafts",
    ),
    (
        ["generate", "--prompt", "a", "--draft", "x", "-sc", '{"method": "ngram"}'],
        "method 'ngram' takes no model, not 'x'",
    ),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[" ".join(words) or "none" for words, _ in WRONG])
def test_wrong_usage_is_one_line_that_names_it(words: list[str], message: str, outrider_: Run) -> None:
    code, out, err = outrider_(*words)
    assert (code, out) == (2, "")
    assert err.startswith("outrider: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has no prompt"),
        (b"\n \n", "has no prompt"),
        (b"ok\n\xff", "is not UTF-8: byte 0xff at offset 3"),
    ],
)
def test_unusable_prompt_files(data: bytes, message: str, outrider_: Run, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(data)
    code, out, err = outrider_("generate", "--prompt-file", str(file))
    assert (code, out) == (2, "")
    assert f"{str(file)!r} {message}" in err


@pytest.mark.parametrize("terminal", [True, False])
def test_no_prompt_at_all(terminal: bool, outrider_: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b""))
    monkeypatch.setattr(stdin, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdin", stdin)
    code, out, err = outrider_("generate")
    assert (code, out) == (2, "")
    assert "there is no prompt" in err
    assert "give --prompt TEXT or --prompt-file FILE" in err


@pytest.mark.parametrize(
    ("failure", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "outrider: interrupted"),
        (KeyError("x"), 1, "outrider: error: internal error (--debug shows where): KeyError: 'x'"),
        (OSError(28, "No space left"), 1, "outrider: error: [Errno 28] No space left"),
    ],
)
def test_other_failures_are_one_line_and_debug_adds_the_traceback(
    failure: BaseException, code: int, line: str, outrider_: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(generate, "load_llm", fail)
    assert outrider_("generate", "--prompt", "a") == (code, "", line + "\n")
    _, _, err = outrider_("generate", "--prompt", "a", "--debug")
    assert err.splitlines()[-1] == line
    assert err.startswith("Traceback") == (code == 1)
