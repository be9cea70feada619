"""Processes of a served cluster die at random moments under streams, whose tokens must stay plain decoding's.

    python benchmarks/serve_faults.py [--rounds 50] [--seed 0] [--ranks 1] [--pipeline serial]

``outrider serve`` on a Ray of its own, with two targets and a draft worker, the embedded pair. In each round
sampled streams run at once, and a random member is killed (SIGKILL) while all of them are under way: a draft
worker, a target, or with ``--ranks 2`` a rank of one. Then the dead one must be replaced, and nothing may be
held for requests any more. A gap is the time between two chunks of a stream; that of a round without a fault
tells the machine's share.

Exits with 1 if a token differs, a stream fails, a gap exceeds what a call waits for another target and a
second more, no draft is accepted, nobody is replaced, or something is left behind.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from common import conditions, finish

from outrider import LLM, SamplingParams
from outrider.cluster.ray_backend import FAILOVER_SECONDS
from outrider.models.demo import corpus

CONTEXT, TEMPERATURE, TEXTS = 1024, 0.8, 8
TARGETS, DRAFTS = 2, 1
SECONDS = 240.0
"""That anything may take on a busy machine."""
CLUSTER = """
name: faults
target:
  {{replicas: {targets}, num_cpus: 0.1, threads: 1, max_model_len: {context}, tensor_parallel_size: {ranks}}}
draft: {{replicas: {drafts}, num_cpus: 0.1, threads: 1}}
speculation: {{pipeline: {pipeline}, tree: {{adaptive: false}}}}
"""
"""Every step verifies a tree, so that nodes are under way whenever somebody dies."""


@dataclass(frozen=True)
class Text:
    """What is asked for, and the target's own tokens."""

    prompt: str
    seed: int
    token_ids: list[int]


@dataclass
class Tally:
    """What the rounds brought."""

    faults: Counter[str] = field(default_factory=Counter)
    streams: int = 0
    identical: int = 0
    errors: list[str] = field(default_factory=list)
    in_flight: int = 0
    """Streams that had not ended when a member was killed."""
    drafted: int = 0
    gaps: dict[str, float] = field(default_factory=dict)
    longest_replacement: float = 0.0
    not_replaced: int = 0
    held_afterwards: int = 0
    """Rounds after which requests or KV blocks were still held."""


class Server:
    """``outrider serve`` with a cluster."""

    def __init__(self, process: "subprocess.Popen[str]", url: str) -> None:
        self.process, self.url = process, url

    def status(self) -> dict[str, Any]:
        (model,) = httpx.get(f"{self.url}/status", timeout=SECONDS).json()["models"]
        return dict(model)

    def pids(self, role: str) -> list[list[int]]:
        """Of the ready members of a role, the first rank first."""
        rows = [row for row in self.status()["members"] if row["role"] == role and row["phase"] == "ready"]
        return [[place["pid"] for place in row["places"]] for row in rows]

    def complete(self) -> bool:
        return (len(self.pids("target")), len(self.pids("draft"))) == (TARGETS, DRAFTS)

    def idle(self) -> bool:
        status = self.status()
        return not (status["running"] or status["waiting"] or status["kv_cache_usage"])


class Stream(threading.Thread):
    """A client that reads a stream to its end."""

    def __init__(self, url: str, text: Text) -> None:
        super().__init__(daemon=True)
        self.text, self._url = text, url
        self.tokens: list[int] = []
        self.arrivals: list[float] = []
        self.drafted = 0
        self.error: str | None = None
        self.start()

    @property
    def longest_gap(self) -> float:
        return max(
            (late - early for early, late in zip(self.arrivals, self.arrivals[1:], strict=False)), default=0
        )

    def run(self) -> None:
        body = {
            "prompt": self.text.prompt,
            "seed": self.text.seed,
            "max_tokens": len(self.text.token_ids),
            "temperature": TEMPERATURE,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=SECONDS) as reply:
                for line in reply.iter_lines():
                    if line.startswith("data: {"):
                        self._take(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            self.error = repr(error)

    def _take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.error = chunk["error"]["message"]
            return
        for choice in chunk["choices"]:
            self.arrivals.append(time.monotonic())
            self.tokens += choice["token_ids"]
        if not chunk["choices"]:
            self.drafted = chunk["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1, help="of each target")
    parser.add_argument(
        "--pipeline", choices=("serial", "parallel"), default="serial", help="serial waits for drafts"
    )
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    texts = undisturbed(args.tokens, args.ranks)
    rng, tally = random.Random(args.seed), Tally()
    folder = Path(tempfile.mkdtemp(prefix="osf"))
    try:
        with served(folder, args.ranks, args.pipeline) as server:
            for number in range(args.rounds + 1):
                # The first round tells what streams are like when nobody dies.
                victim = rng.choice(["draft", "target"] + ["rank"] * (args.ranks > 1)) if number else None
                play(server, rng, tally, rng.sample(texts, args.streams), victim)
                print(f"round {number}: {tally}", file=sys.stderr, flush=True)
        left = [] if until(lambda: not processes_of(folder), 30.0) else processes_of(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(tally, args, len(left))


def undisturbed(tokens: int, ranks: int) -> list[Text]:
    """Texts as the target alone gives them."""
    texts = []
    with LLM(max_model_len=CONTEXT, tensor_parallel_size=ranks) as llm:
        for seed, prompt in enumerate(corpus.held_out_prompts(TEXTS)):
            params = SamplingParams(max_tokens=tokens, temperature=TEMPERATURE, seed=seed, ignore_eos=True)
            (output,) = llm.generate([prompt], params, speculative=False)
            texts.append(Text(prompt, seed, output.outputs[0].token_ids))
    return texts


@contextmanager
def served(folder: Path, ranks: int, pipeline: str) -> Iterator[Server]:
    """On a free port; it ends in order."""
    file = folder / "cluster.yaml"
    settings = {
        "targets": TARGETS,
        "drafts": DRAFTS,
        "context": CONTEXT,
        "ranks": ranks,
        "pipeline": pipeline,
    }
    file.write_text(CLUSTER.format(**settings))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OUTRIDER_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "outrider.cluster.cli.main", "serve", str(file), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**kept, "TMPDIR": str(folder), "HOME": str(folder), "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.search(r"served at (\S+)", line)
        assert found is not None, line
        # Nobody reads what follows; a full pipe would hold the server back.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield Server(process, found[1])
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(SECONDS)


def play(server: Server, rng: random.Random, tally: Tally, texts: list[Text], victim: str | None) -> None:
    """One round."""
    assert until(server.complete, SECONDS), "the cluster is not complete"
    streams = [Stream(server.url, text) for text in texts]
    moment = rng.randrange(1, len(texts[0].token_ids) // 2)
    if victim is not None:
        assert until(lambda: all(len(each.tokens) >= moment or each.error for each in streams), SECONDS)
        tally.in_flight += sum(each.is_alive() for each in streams)
        kill(server, rng, victim)
        tally.faults[victim] += 1
    for each in streams:
        each.join(SECONDS)
    note(tally, streams, victim or "none")
    began = time.monotonic()
    if until(server.complete, SECONDS):
        tally.longest_replacement = max(tally.longest_replacement, time.monotonic() - began)
    else:
        tally.not_replaced += 1
    tally.held_afterwards += not until(server.idle, 10.0)


def kill(server: Server, rng: random.Random, victim: str) -> None:
    ranks = rng.choice(server.pids("draft" if victim == "draft" else "target"))
    os.kill(rng.choice(ranks[1:]) if victim == "rank" else ranks[0], signal.SIGKILL)


def note(tally: Tally, streams: list[Stream], victim: str) -> None:
    tally.streams += len(streams)
    tally.identical += sum(each.tokens == each.text.token_ids for each in streams)
    tally.errors += [each.error for each in streams if each.error is not None]
    tally.drafted += sum(each.drafted for each in streams)
    tally.gaps[victim] = max(tally.gaps.get(victim, 0.0), *(each.longest_gap for each in streams))


def until(condition: Callable[[], object], seconds: float) -> bool:
    """Whether it comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def processes_of(folder: Path) -> list[int]:
    """Those that run with this folder as their home: the server, Ray and all members."""
    found, mark = [], f"HOME={folder}\0".encode()
    for each in Path("/proc").iterdir():
        try:
            if each.name.isdecimal() and mark in (each / "environ").read_bytes():
                found.append(int(each.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def report(tally: Tally, args: argparse.Namespace, left: int) -> None:
    limit = FAILOVER_SECONDS + 1.0
    result: dict[str, Any] = {
        "faults": dict(tally.faults),
        "streams": tally.streams,
        "streams_identical": tally.identical,
        "streams_in_flight_at_faults": tally.in_flight,
        "accepted_draft_tokens": tally.drafted,
        "errors": tally.errors,
        "longest_gap_s": {victim: round(gap, 2) for victim, gap in tally.gaps.items()},
        "gap_limit_s": limit,
        "longest_replacement_s": round(tally.longest_replacement, 1),
        "not_replaced": tally.not_replaced,
        "rounds_with_held_requests_or_kv_blocks": tally.held_afterwards,
        "leaked_processes": left,
    }
    finish({"serve_faults": result, **conditions(**vars(args))})
    bad = tally.errors or tally.not_replaced or tally.held_afterwards or left or not tally.drafted
    sys.exit(bool(bad) or tally.identical < tally.streams or max(tally.gaps.values()) > limit)


if __name__ == "__main__":
    main()
