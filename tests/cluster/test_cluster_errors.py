"""What can be wrong with draft workers, for people: one line that names it, and the exit code."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from instruments.processes import SECONDS

from outrider import LLM
from outrider.cluster import draft_service, remote_drafting
from outrider.cluster.cluster_security import TOKEN_VARIABLE
from outrider.cluster.launcher import LocalWorkers
from outrider.models.demo import pair
from outrider.speculation.errors import InvalidConfigError, WorkerError

Run = Callable[..., tuple[int, str, str]]
GENERATE = ("generate", "--prompt", "a", "--max-tokens", "2")


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    """A draft worker in this process answers signals itself."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def refused(outrider_: Run, *words: str, code: int = 2) -> str:
    """The line that such a command ends with."""
    ended, out, err = outrider_(*words)
    assert (ended, out) == (code, ""), err
    assert err.startswith("outrider: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("outrider: error: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--workers", "lokal"), "--workers must be 'local', 'local:N' or host:port, not 'lokal'"),
        (("--workers", "local:0"), "count must be a positive integer, not 0"),
        (("--workers", "local:7000"), "count must be at most 64, not 7000"),
        (("--workers", "local:x"), "--workers must be local:N, not 'local:x'"),
        (("--workers", "here:99999"), "host:port, not 'here:99999'"),
        (
            ("--workers", "local", "--pipeline", "paralel"),
            "--pipeline must be one of serial, parallel, pearl",
        ),
        (("--pipeline", "parallel"), "pipeline 'parallel' needs workers, such as 'local'"),
        (("--workers", "local", "--threads", "0"), "--threads must be at least 1, not 0"),
        (("--workers", "local", "--target", "x"), "--workers needs something that drafts: give --draft"),
        (
            ("--workers", "h:1", "--draft", "x"),
            "the workers' model is theirs to choose, so model 'x' must go",
        ),
        (("-sc", '{"model": "x", "workers": {"tls_ca": "y"}}'), "local workers do without TLS"),
        (("--workers", "local", "--draft", "/no/model"), "there is no model folder '/no/model'"),
    ],
)
def test_wrong_flags_of_generate(words: tuple[str, ...], message: str, outrider_: Run) -> None:
    assert message in refused(outrider_, *GENERATE, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--threads", "0"), "--threads must be at least 1, not 0"),
        (("--port", "99999"), "--port must be from 0 to 65535, not 99999"),
        (("--max-sessions", "0"), "--max-sessions must be at least 1, not 0"),
        (("--draft", "/no/model"), "there is no model folder '/no/model'"),
        (("--host", "0.0.0.0"), "beyond this machine, needs a cluster token: set OUTRIDER_CLUSTER_TOKEN"),
        (("--tls-certificate", "x.pem"), "the certificate x.pem needs a key file"),
    ],
)
def test_wrong_flags_of_draft_worker(
    words: tuple[str, ...], message: str, outrider_: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert message in refused(outrider_, "draft-worker", *words)


def test_a_port_that_is_taken(outrider_: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(outrider_, "draft-worker", "--port", str(port))
    assert line == f"cannot listen on 127.0.0.1:{port}; is the port taken?\n"
    assert not [each for each in threading.enumerate() if each.name == "outrider-io"]


def test_nobody_listens(outrider_: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_drafting, "CONNECT_SECONDS", 0.5)
    line = refused(outrider_, *GENERATE, "--workers", "localhost:1", code=1)
    assert line.startswith("no draft worker can be used: localhost:1: UNAVAILABLE: ")
    assert "Connection refused" in line


def test_a_wrong_token(outrider_: Run, workers: LocalWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_drafting, "CONNECT_SECONDS", 100 * SECONDS)  # a refusal is not waited out
    monkeypatch.setenv(TOKEN_VARIABLE, "wrong")
    line = refused(outrider_, *GENERATE, "--workers", ",".join(workers.addresses), code=1)
    for address in workers.addresses:
        assert f"{address}: UNAUTHENTICATED: the cluster token is wrong" in line


def test_another_vocabulary(
    outrider_: Run,
    workers: LocalWorkers,
    make_model_folder: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(remote_drafting, "CONNECT_SECONDS", 100 * SECONDS)
    words = ("--target", str(make_model_folder("llama")), "--workers", workers.addresses[0])
    capsys.readouterr()  # what transformers says while it saves a model
    line = refused(outrider_, *GENERATE, *words)
    assert "the target's vocabulary is " in line
    assert "this draft worker's " in line


def test_one_of_two_addresses_is_wrong(
    outrider_: Run, workers: LocalWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_drafting, "CONNECT_SECONDS", 1.0)
    code, out, err = outrider_(*GENERATE, "--prompt", "b", "--workers", f"{workers.addresses[0]},localhost:1")
    assert code == 0
    assert out
    (line,) = [line for line in err.splitlines() if not line.startswith("==")]
    assert line.startswith("outrider: warning: the draft worker at localhost:1 is out of reach: ")


def test_a_worker_that_dies_while_it_loads(make_model_folder: Any, tmp_path: Path) -> None:
    folder = Path(make_model_folder("llama"))
    for file in folder.iterdir():
        half = 900 if file.suffix == ".safetensors" else None
        (tmp_path / file.name).write_bytes(file.read_bytes()[:half])
    config = {"model": str(tmp_path), "workers": "local"}
    with pytest.raises(WorkerError, match=r"a draft worker ended with code 1: .*safetensors"):
        LLM(str(folder), speculative_config=config)


def test_an_error_in_the_worker_s_loop_ends_it_with_a_line(
    outrider_: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> bool:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(draft_service.DraftWorker, "step", fail)
    code, out, err = outrider_("draft-worker")
    assert (code, out.startswith('{"address": "127.0.0.1:')) == (1, True)
    assert err == "outrider: error: internal error (--debug shows where): RuntimeError: out of memory\n"
    assert not [each for each in threading.enumerate() if each.name == "outrider-io"]


def test_a_token_that_cannot_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "two words")
    with pytest.raises(InvalidConfigError, match="printable ASCII"):
        LLM(str(pair.TARGET), speculative_config={"workers": "localhost:1"})
