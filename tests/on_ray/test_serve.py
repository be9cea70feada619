"""The API on Ray Serve: processes die under streams, and the streams go on with the same tokens."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from instruments.processes import until

from outrider import LLM, SamplingParams

PROMPT = "def fibonacci(n):"
SECONDS = 180.0
LENGTH = 400
SEEDS = range(4)
STREAMS = {
    "max_tokens": LENGTH,
    "temperature": 0.8,
    "ignore_eos": True,
    "stream": True,
    "return_token_ids": True,
}
CLUSTER = """
name: served
target: {replicas: 2, num_cpus: 0.5, threads: 1, max_model_len: 1024}
draft: {num_cpus: 0.5, threads: 1}
"""


class Server:
    """``outrider serve`` on a port of its own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (folder / "cluster.yaml").write_text(CLUSTER)
        hidden = ("RAY_", "OUTRIDER_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        words = ["serve", str(folder / "cluster.yaml"), "--port", str(self.port)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "outrider.cluster.cli.main", *words],
            stderr=subprocess.PIPE,
            text=True,
            env={**kept, "TMPDIR": str(folder), "HOME": str(folder), "PYTHONUNBUFFERED": "1"},
        )
        self.url = f"http://127.0.0.1:{self.port}"

    def status(self) -> dict[str, Any]:
        (model,) = httpx.get(f"{self.url}/status", timeout=30).json()["models"]
        return dict(model)

    def pids(self, role: str) -> list[int]:
        """Of the members of a role that serve."""
        rows = [row for row in self.status()["members"] if row["role"] == role and row["phase"] == "ready"]
        return [place["pid"] for row in rows for place in row["places"]]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    folder = Path(f"/tmp/ors-{os.getpid()}")
    folder.mkdir()
    server = Server(folder)
    try:
        assert server.process.stderr is not None
        line = server.process.stderr.readline()
        assert "is served at" in line, line
        yield server
    finally:
        server.process.send_signal(signal.SIGINT)
        server.process.communicate(timeout=60)
        assert server.process.returncode == 0
        subprocess.run(["rm", "-rf", str(folder)], check=True)


@pytest.fixture(scope="module")
def undisturbed() -> dict[int, list[int]]:
    """Tokens by seed, as the target alone gives them."""
    with LLM(max_model_len=1024) as llm:
        tokens = {}
        for seed in SEEDS:
            params = SamplingParams(max_tokens=LENGTH, temperature=0.8, seed=seed, ignore_eos=True)
            (output,) = llm.generate([PROMPT], params, speculative=False)
            tokens[seed] = output.outputs[0].token_ids
        return tokens


class Stream(threading.Thread):
    """A client that reads a stream to its end."""

    def __init__(self, url: str, seed: int) -> None:
        super().__init__(daemon=True)
        self.url, self.seed = url, seed
        self.tokens: list[int] = []
        self.usage: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}
        self.error: Any = None
        self.start()

    def run(self) -> None:
        body = {"prompt": PROMPT, "seed": self.seed, **STREAMS, "stream_options": {"include_usage": True}}
        try:
            with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=SECONDS) as reply:
                for line in reply.iter_lines():
                    if line.startswith("data: {"):
                        self._take(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            self.error = error

    def _take(self, chunk: dict[str, Any]) -> None:
        self.error = chunk.get("error", self.error)
        for choice in chunk.get("choices", ()):
            self.tokens += choice["token_ids"]
        if not chunk.get("choices"):
            self.usage, self.metrics = chunk.get("usage", {}), chunk.get("metrics", {})


@pytest.mark.parametrize("victim", ["target", "draft"])
def test_streams_survive_the_death_of_a_process(
    victim: str, server: Server, undisturbed: dict[int, list[int]]
) -> None:
    wanted = len(server.pids(victim))
    assert until(lambda: len(server.pids("target")) == 2 and server.pids("draft"), SECONDS)
    streams = [Stream(server.url, seed) for seed in SEEDS]
    assert until(lambda: all(len(each.tokens) > 20 for each in streams), SECONDS)
    assert all(len(each.tokens) < LENGTH for each in streams), "nothing is in flight any more"
    os.kill(server.pids(victim)[0], signal.SIGKILL)
    for stream in streams:
        stream.join(SECONDS)
    assert [each.error for each in streams] == [None] * len(streams)
    assert {each.seed: each.tokens for each in streams} == undisturbed
    assert all(each.usage["completion_tokens"] == LENGTH for each in streams)
    assert sum(each.metrics["speculative_decoding"]["num_accepted_draft_tokens"] for each in streams)
    assert until(lambda: len(server.pids(victim)) == wanted, SECONDS), "nobody replaced it"
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert until(lambda: server.status()["running"] == 0 and server.status()["kv_cache_usage"] == 0, SECONDS)


def test_a_client_that_goes_away_frees_its_memory(server: Server) -> None:
    body = {"prompt": PROMPT, "seed": 1, **STREAMS, "max_tokens": 1000}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=SECONDS) as reply:
        # The iterator has to stay: the client goes away with it.
        lines = reply.iter_lines()
        next(lines)
        assert server.status()["running"] == 1
    assert until(lambda: server.status()["running"] == 0 and server.status()["kv_cache_usage"] == 0, 5.0)


def test_without_a_target_it_is_unhealthy_at_once(server: Server) -> None:
    for pid in server.pids("target"):
        os.kill(pid, signal.SIGKILL)
    unhealthy = lambda: httpx.get(f"{server.url}/health", timeout=30).status_code == 503  # noqa: E731
    assert until(unhealthy, 2.0)
    refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT, "max_tokens": 1}, timeout=30)
    assert refused.status_code in (200, 503)
    assert refused.status_code == 200 or "retry-after" in refused.headers
    assert until(lambda: httpx.get(f"{server.url}/health", timeout=30).status_code == 200, SECONDS)


def test_streams_end_before_the_server_does() -> None:
    folder = Path(f"/tmp/ord-{os.getpid()}")
    folder.mkdir()
    server = Server(folder)
    assert server.process.stderr is not None
    assert "is served at" in server.process.stderr.readline()
    stream = Stream(server.url, seed=1)
    assert until(lambda: len(stream.tokens) > 5, SECONDS)
    server.process.send_signal(signal.SIGTERM)
    stream.join(SECONDS)
    assert (stream.error, len(stream.tokens)) == (None, LENGTH)
    server.process.communicate(timeout=60)
    assert server.process.returncode == 0
    subprocess.run(["rm", "-rf", str(folder)], check=True)
