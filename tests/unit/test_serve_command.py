"""``outrider serve``: what it refuses before it loads anything, and how it ends."""

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from conftest import MakeModelFolder
from instruments.api_servers import events_of
from instruments.serve_process import ServeProcess, serve_process

Run = Callable[..., tuple[int, str, str]]

WRONG: list[tuple[list[str], str]] = [
    (["--prot", "1"], "unknown flag '--prot'; did you mean '--port'?"),
    (["--port", "x"], "--port must be an integer, not 'x'"),
    (["--port", "-1"], "port must be at least 0, not -1"),
    (["--port", "65536"], "port must be at most 65535, not 65536"),
    (["--host", ""], "--host must not be empty"),
    (["--host", "256.256.256.256", "--port", "0"], "cannot listen at 256.256.256.256, port 0"),
    (["--host", "a" * 64, "--port", "0"], "cannot listen at aaa"),
    (["--host", "192.0.2.1", "--port", "0"], "cannot listen at 192.0.2.1, port 0"),
    (["--max-waiting", "-1"], "max-waiting must be at least 0"),
    (["--max-choices", "0"], "max-choices must be at least 1, not 0"),
    (["--max-body-size", "0"], "max-body-size must be at least 1, not 0"),
    (["--api-key", ""], "api-key must be ASCII, not empty"),
    (["--api-key", " k"], "api-key must be ASCII, not empty, and without spaces around it"),
    (["--api-key", "ü"], "api-key must be ASCII"),
    (["--api-key-file", "/no/such"], "the API key file '/no/such' cannot be read: No such file"),
    (["--chat-template", "/no/such"], "the chat template '/no/such' cannot be read: No such file"),
    (["--chat-template", "/"], "the chat template '/' cannot be read: Is a directory"),
    (["--max-tokens", "0"], "max-tokens must be at least 1, not 0"),
    (["no-such.yaml"], "no-such.yaml cannot be read: No such file or directory"),
    (["--model", "/no/model", "--port", "0"], "there is no model folder '/no/model'"),
    (
        ["--trace", "/no/such/trace.json", "--port", "0"],
        "'/no/such/trace.json' cannot be written: No such file",
    ),
    (["-sc", "{"], "must be JSON, and '{' is not"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[" ".join(words)[:40] for words, _ in WRONG])
def test_wrong_usage_is_one_line_that_names_it(words: list[str], message: str, outrider_: Run) -> None:
    code, out, err = outrider_("serve", *words)
    assert (code, out) == (2, "")
    assert err.startswith("outrider: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_key_file_without_keys(outrider_: Run, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("\n  \n")
    code, _, err = outrider_("serve", "--api-key-file", str(keys))
    assert (code, err) == (2, f"outrider: error: the API key file {str(keys)!r} is empty\n")


def test_an_empty_key_in_the_environment(outrider_: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_API_KEY", "")
    code, _, err = outrider_("serve")
    assert code == 2
    assert "must be ASCII, not empty" in err


def test_a_port_that_is_taken(outrider_: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = outrider_("serve", "--port", str(port))
    assert code == 2
    assert f"cannot listen at 127.0.0.1, port {port}: Address already in use" in err


@pytest.fixture
def server(make_model_folder: MakeModelFolder, tmp_path: Path) -> Iterator[ServeProcess]:
    """A small model with everything that flags can say of how it is offered."""
    (tmp_path / "keys.txt").write_text("first\n\nsecond \n")
    (tmp_path / "template.jinja").write_text("{{ messages[0].content }}")
    folder = make_model_folder("llama", max_position_embeddings=4096)
    with serve_process(
        *("--model", str(folder), "--served-model-name", "one", "two", "--seed", "5"),
        *("--api-key-file", str(tmp_path / "keys.txt"), "--chat-template", str(tmp_path / "template.jinja")),
        *("--max-tokens", "300", "--max-choices", "2", "--max-body-size", "5000"),
        *("--trace", str(tmp_path / "trace.json")),
    ) as process:
        yield process


def test_flags_hold_and_ctrl_c_lets_streams_end(server: ServeProcess, outrider_: Run, tmp_path: Path) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    # A second one beside it is told before it loads a model.
    code, _, err = outrider_("serve", "--port", str(server.port), "--model", "/no/model")
    assert code == 2
    assert f"port {server.port}: Address already in use" in err
    key = {"authorization": "Bearer second"}
    with httpx.Client(base_url=server.url, headers=key, timeout=60) as client:
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        # Before anybody is asked for a key.
        assert httpx.get(f"{server.url}/health", headers={"a": "b" * 60_000}).status_code == 200
        assert httpx.get(f"{server.url}/health", headers={"a": "b" * 70_000}).status_code == 400
        assert [row["id"] for row in client.get("/v1/models").json()["data"]] == ["one", "two"]
        messages = [{"role": "user", "content": "def f("}]
        chat = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 8}).json()
        same = {"prompt": "def f(", "max_tokens": 8, "seed": chat["seed"]}
        text = client.post("/v1/completions", json=same).json()["choices"][0]["text"]
        assert chat["choices"][0]["message"]["content"] == text
        for refused, status in (
            ({"prompt": "a", "max_tokens": 301}, 400),
            ({"prompt": "a", "n": 3}, 400),
            ({"prompt": "a" * 5000}, 413),
        ):
            assert client.post("/v1/completions", json=refused).status_code == status
        body = {
            "prompt": "a",
            "max_tokens": 300,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        with client.stream("POST", "/v1/completions", json=body) as stream:
            chunks = stream.iter_text()
            first = next(chunks)
            server.signal(signal.SIGINT)
            text = first + "".join(chunks)
    streamed = [token for event in events_of(text) for token in event["choices"][0]["token_ids"]]
    assert len(streamed) == 300
    assert server.exit_code() == 0
    committed = [
        event["args"]["committed"]
        for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        if "committed" in event.get("args", {})
    ]
    # Two answers of at most 8 tokens came before.
    assert [token for step in committed for token in step][-300:] == streamed
    log = "".join(server.lines)
    assert "Traceback" not in log
    assert "POST /v1/completions 200" in log
    for secret in ("first", "second", "def f("):
        assert secret not in log


def test_a_second_signal_does_not_wait(make_model_folder: MakeModelFolder) -> None:
    folder = make_model_folder("llama", max_position_embeddings=100_000)
    with serve_process("--model", str(folder), "--kv-cache-memory", "200MB") as server:
        body = {"prompt": "a", "max_tokens": 90_000, "ignore_eos": True, "stream": True}
        with (
            httpx.Client(timeout=60) as client,
            client.stream("POST", f"{server.url}/v1/completions", json=body) as stream,
        ):
            next(stream.iter_raw())
            server.signal(signal.SIGINT)
            server.signal(signal.SIGINT)
            assert server.exit_code() == 0
    assert not os.path.exists(f"/proc/{server.process.pid}")
    assert json.dumps("Traceback") not in json.dumps(server.lines)
