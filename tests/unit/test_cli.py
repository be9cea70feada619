"""The command line as a stranger types it: what is printed where, and the exit codes."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from instruments.processes import INTERRUPTED

import outrider
from outrider.cluster.cli import output

ENTRY = [sys.executable, "-c", "import sys; from outrider.cluster.cli.main import main; sys.exit(main())"]
DRAFT_ALWAYS = '{"tree": {"adaptive": false}}'
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def target(make_model_folder: Any) -> str:
    return str(make_model_folder("llama", seed=1))


@pytest.fixture(scope="module")
def draft(make_model_folder: Any) -> str:
    return str(make_model_folder("llama", seed=1, num_hidden_layers=1))


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_plain_text_and_json_hold_the_same_result(outrider_: Run, target: str, draft: str) -> None:
    words = ("generate", "--target", target, "--draft", draft, "--prompt", "def f", "--max-tokens", "12")
    code, text, err = outrider_(*words)
    assert (code, err) == (0, "")
    code, lines, err = outrider_(*words, "--json")
    assert (code, err) == (0, "")
    (row,) = rows(lines)
    assert text == row["text"] + "\n"
    assert len(row.pop("token_ids")) == 12
    assert row.pop("stats")["num_output_tokens"] == 12
    assert isinstance(row.pop("seed"), int)
    assert isinstance(row.pop("text"), str)
    assert row == {"prompt": "def f", "index": 0, "finish_reason": "length", "stop_reason": None}


def test_a_seed_repeats_all_choices_and_speculation_changes_none(outrider_: Run, target: str) -> None:
    # A target that drafts for itself has its tokens accepted, so speculation has an effect to hide.
    words = ["generate", "--target", target, "--prompt", "the quick", "--n", "2", "--seed", "5", "--json"]
    words += ["--temperature", "1", "--top-k", "40", "--ignore-eos", "--max-tokens", "20"]
    helped = [*words, "--draft", target, "-sc", DRAFT_ALWAYS, "--num-speculative-tokens", "3"]
    tokens, accepted = [], []
    for each in (helped, helped, [*helped, "--no-speculation"], words):
        code, out, _ = outrider_(*each)
        assert code == 0
        tokens.append([row["token_ids"] for row in rows(out)])
        accepted.append(sum(row["stats"]["num_accepted_draft_tokens"] for row in rows(out)))
        assert [(row["index"], row["seed"]) for row in rows(out)] == [(0, 5), (1, 5)]
    assert tokens[0] == tokens[1] == tokens[2] == tokens[3]
    assert tokens[0][0] != tokens[0][1]
    assert accepted[0] > 0
    assert accepted[2:] == [0, 0]


def test_json_has_a_place_for_log_probabilities(outrider_: Run, target: str) -> None:
    words = ("generate", "--target", target, "--prompt", "def f", "--max-tokens", "3", "--json")
    _, out, _ = outrider_(*words, "--logprobs", "2", "--prompt-logprobs", "0")
    (row,) = rows(out)
    for entry, token in zip(row["logprobs"], row["token_ids"], strict=True):
        assert entry["top"][0] == [token, entry["logprob"]]
        assert (entry["token_id"], entry["rank"], len(entry["top"])) == (token, 1, 2)
    first, *others = row["prompt_logprobs"]
    assert first is None
    assert others
    assert all(entry["top"] == [] and entry["logprob"] < 0 for entry in others)
    _, out, _ = outrider_(*words, "--logprobs", "0")
    assert "prompt_logprobs" not in rows(out)[0]


def test_a_stop_string_ends_the_text_before_it(outrider_: Run, target: str) -> None:
    words = ("generate", "--target", target, "--prompt", "def f", "--max-tokens", "20", "--json")
    text = rows(outrider_(*words)[1])[0]["text"]
    stop = text[5:8]
    _, out, _ = outrider_(*words, "--stop", "never there", "--stop", stop)
    (row,) = rows(out)
    assert row["text"] == text[: text.index(stop)]
    assert (row["finish_reason"], row["stop_reason"]) == ("stop", stop)


def test_a_file_gives_a_prompt_a_line_and_labels_stay_out_of_the_output(
    outrider_: Run, target: str, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffdef f\r\n\n  \r\n東京\n".encode())
    words = ("generate", "--target", target, "--max-tokens", "4", "--prompt-file", str(file))
    code, out, err = outrider_(*words)
    assert code == 0
    assert err.splitlines() == ["== prompt 1, choice 0 ==", "== prompt 2, choice 0 =="]
    _, lines, err = outrider_(*words, "--json")
    assert err == ""
    assert [row["prompt"] for row in rows(lines)] == ["def f", "東京"]
    assert out == "".join(row["text"] + "\n" for row in rows(lines))


def test_standard_input_is_one_prompt(outrider_: Run, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"def f\n\nx\n")))
    code, out, _ = outrider_("generate", "--target", target, "--max-tokens", "2", "--json")
    assert code == 0
    assert [row["prompt"] for row in rows(out)] == ["def f\n\nx"]


def test_a_terminal_shows_text_as_it_comes_and_figures_after_it(
    outrider_: Run, target: str, draft: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("generate", "--target", target, "--prompt", "def f", "--max-tokens", "30")
    _, plain, _ = outrider_(*words)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, out, err = outrider_(*words, "--draft", draft, "-sc", DRAFT_ALWAYS)
    assert code == 0
    assert out == plain.translate(output._VISIBLE)
    assert out != plain, "the tiny model no longer writes control characters: choose another seed"
    assert "30 tokens in " in err
    assert "mean acceptance length " in err
    _, _, err = outrider_(*words, "--prompt", "the")
    assert [line.endswith("; no speculation") for line in err.splitlines()] == [False, True] * 2


def test_a_terminal_shows_progress_beside_clean_json(
    outrider_: Run, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(output, "SHOW_AFTER_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    words = ("generate", "--target", target, "--prompt", "a", "--prompt", "b", "--max-tokens", "3", "--json")
    code, out, err = outrider_(*words)
    assert code == 0
    assert len(rows(out)) == 2
    assert "generating" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "int3"], "--dtype must be auto, bfloat16, float32, float64, not 'int3'"),
        (["--max-model-len", "513"], "--max-model-len must be from 2 to"),
        (["--max-model-len", "4"], "prompt 2 of 2: the prompt has "),
    ],
)
def test_what_only_the_model_can_refuse(flags: list[str], message: str, outrider_: Run, target: str) -> None:
    prompts = ("--prompt", "a", "--prompt", "a prompt of some length")
    code, out, err = outrider_("generate", "--target", target, *prompts, *flags)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_damaged_model_is_not_wrong_usage(outrider_: Run, target: str, tmp_path: Path) -> None:
    for file in Path(target).iterdir():
        (tmp_path / file.name).write_bytes(
            file.read_bytes()[: 900 if file.suffix == ".safetensors" else None]
        )
    code, _, err = outrider_("generate", "--target", str(tmp_path), "--prompt", "a")
    assert code == 1
    assert err.startswith("outrider: error: ")
    assert err.count("\n") == 1


def test_help_and_version(outrider_: Run) -> None:
    code, out, _ = outrider_("--help")
    assert code == 0
    assert "example" in out
    assert "generate" in out
    assert outrider_("--version") == (0, f"outrider {outrider.__version__}\n", "")
    code, out, _ = outrider_("generate", "--help")
    assert code == 0
    assert "examples:" in out
    flags = "prompt prompt-file target draft max-tokens temperature top-p top-k min-p seed n stop dtype"
    flags += " numerics no-speculation num-speculative-tokens json speculative-config max-model-len"
    flags += " ignore-eos threads tensor-parallel-size debug logprobs prompt-logprobs"
    for flag in flags.split():
        assert f"--{flag}" in out
    assert "-sc " in out


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "outrider", "--version"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"outrider {outrider.__version__}\n")


def test_help_does_not_wait_for_torch() -> None:
    check = (
        "import sys; from outrider.cluster.cli.main import main; assert main(['generate', '--help']) == 0; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_a_reader_that_leaves_ends_it_quietly(
    outrider_: Run, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        code, _, err = outrider_("generate", "--target", target, "--prompt", "a", "--max-tokens", "2")
    assert (code, err) == (141, "")


def test_a_reader_that_leaves_ends_help_quietly() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    # Unbuffered, argparse itself would meet the broken pipe, and ignore it.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open(write_end, "wb") as pipe:
        done = subprocess.run([*ENTRY, "--help"], stdout=pipe, stderr=subprocess.PIPE, env=env, timeout=60)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX's")
def test_ctrl_c_while_text_appears(target: str) -> None:
    import pty

    main_end, terminal = pty.openpty()
    words = ["generate", "--target", target, "--threads", "1", "--ignore-eos", "--max-tokens", "500"]
    words += [f"--prompt={number}" for number in range(100)]
    with subprocess.Popen(
        [*ENTRY, *words], stdin=terminal, stdout=terminal, stderr=subprocess.PIPE
    ) as process:
        os.close(terminal)
        try:
            assert os.read(main_end, 1)
        except OSError:  # it ended before it wrote anything, and standard error says why
            pytest.fail(process.communicate(timeout=60)[1].decode())
        finally:
            process.send_signal(signal.SIGINT)
            # Closing makes what it still writes fail at once, and not wait for a reader.
            os.close(main_end)
        # It takes a fraction of a second; the limit only tells that from a hang on a busy machine.
        _, err = process.communicate(timeout=60)
    assert process.returncode in INTERRUPTED
    assert err.decode().splitlines()[-1] == "outrider: interrupted"
    assert "Traceback" not in err.decode()
