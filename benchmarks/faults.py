"""Random faults of draft workers, at random moments, against plain decoding.

    python benchmarks/faults.py [--rounds 200] [--seed 0] [--tokens 60]

Each round opens a target at two workers, hurts one of them while a request is served (kill,
stop, restart or disconnect), mends it, and serves the request until drafts are accepted again.
Exits with 1 if a token differs, acceptance does not come back, or something is left behind.
A stall is what a step took beside the target's forward; plain decoding's own tells the machine's share.
"""

import argparse
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import conditions, finish

from outrider import LLM, SamplingParams
from outrider.actors.model_runner import ModelRunner
from outrider.actors.request_run import RequestRun
from outrider.cluster.cluster_security import TOKEN_VARIABLE
from outrider.cluster.launcher import LocalWorkers
from outrider.models.demo import corpus, pair
from outrider.speculation.request import Request

FAULTS = ("kill", "stop", "restart", "disconnect")
PIPELINES = ("parallel", "serial")
RECOVERY_SECONDS = 30.0
WARM_ROUNDS = 4
"""Rounds that may open what then stays open."""


class Relay:
    """Passes bytes between targets and one worker, and can cut all connections."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._far = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        for each in list(self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                far = socket.create_connection(self._far)
            except OSError:
                near.close()
                continue
            self._sockets |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
        self._sockets.discard(source)
        source.close()


@dataclass
class Tally:
    """What the rounds brought."""

    faults: Counter[str] = field(default_factory=Counter)
    identical: int = 0
    recovered: int = 0
    largest_stall: float = 0.0
    largest_plain_stall: float = 0.0
    steps: int = 0
    steps_over_250_ms: int = 0
    longest_recovery: float = 0.0
    leaked_sessions: int = 0
    leaked_kv_blocks: int = 0
    leaked_processes: int = 0
    files: list[int] = field(default_factory=list)

    @property
    def leaked_files(self) -> int:
        """Descriptors: the last rounds' most against the first's."""
        return max(0, max(self.files[-WARM_ROUNDS:]) - max(self.files[:WARM_ROUNDS]))


class Cluster:
    """Two workers, each behind a relay."""

    def __init__(self) -> None:
        self.workers = LocalWorkers(2, ["--draft", str(pair.DRAFT)])
        assert self.workers.security.token is not None
        os.environ[TOKEN_VARIABLE] = self.workers.security.token
        self.relays = [Relay(address) for address in self.workers.addresses]

    def hurt(self, fault: str, index: int) -> None:
        pid = self.workers.pids[index]
        if fault == "disconnect":
            self.relays[index].cut()
        elif fault == "restart":
            os.kill(pid, signal.SIGTERM)
        else:
            os.kill(pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)

    def mend(self, fault: str, index: int) -> None:
        if fault in ("kill", "restart"):
            self.workers.restart(index)
        else:
            os.kill(self.workers.pids[index], signal.SIGCONT)

    def close(self) -> None:
        for relay in self.relays:
            relay.close()
        self.workers.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, tally, cluster = random.Random(args.seed), Tally(), Cluster()
    try:
        for number in range(args.rounds):
            play(cluster, rng, tally, args.tokens)
            print(f"round {number + 1}: {tally}", file=sys.stderr, flush=True)
    finally:
        cluster.close()
    tally.leaked_processes += len(children())
    report(tally, args.rounds)


def play(cluster: Cluster, rng: random.Random, tally: Tally, tokens: int) -> None:
    """One round."""
    fault, index, moment = rng.choice(FAULTS), rng.randrange(2), rng.randrange(tokens // 2)
    tally.faults[fault] += 1
    prompt = rng.choice(corpus.held_out_prompts(20))
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.0]), seed=rng.randrange(1 << 30), max_tokens=tokens
    )
    addresses = [relay.address for relay in cluster.relays]
    config = {"workers": addresses, "pipeline": rng.choice(PIPELINES), "tree": {"adaptive": False}}
    with LLM(speculative_config=config) as llm:
        assert llm.workers is not None
        truth = serve(llm, llm.prepare(prompt, params, speculative=False)[1][0])
        tally.largest_plain_stall = max(tally.largest_plain_stall, *truth.stalls)
        (request,) = llm.prepare(prompt, params)[1]
        hurt = serve(llm, request, lambda step: cluster.hurt(fault, index) if step == moment else None)
        tally.steps += len(hurt.stalls)
        tally.steps_over_250_ms += sum(stall > 0.25 for stall in hurt.stalls)
        tally.largest_stall = max(tally.largest_stall, *hurt.stalls)
        tally.identical += hurt.token_ids == truth.token_ids
        if len(hurt.stalls) <= moment:  # the request was over before
            cluster.hurt(fault, index)
        cluster.mend(fault, index)
        await_recovery(llm, request, cluster, index, tally)
        llm.workers.pool.poll()
        tally.leaked_sessions += llm.workers.pool.num_sessions
        tally.leaked_kv_blocks += leaked_blocks(llm)
    tally.leaked_processes += len(children()) - 2
    tally.files.append(len(os.listdir("/proc/self/fd")))


def await_recovery(llm: LLM, request: Request, cluster: Cluster, index: int, tally: Tally) -> None:
    """Until the worker that was hurt has drafts accepted; the other one is cut off meanwhile."""
    began = time.monotonic()
    while time.monotonic() - began < RECOVERY_SECONDS:
        cluster.relays[1 - index].cut()
        if serve(llm, request).accepted.get(f"draft-{index}"):
            tally.recovered += 1
            tally.longest_recovery = max(tally.longest_recovery, time.monotonic() - began)
            return


@dataclass
class Served:
    token_ids: list[int] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)
    accepted: dict[str, int] = field(default_factory=dict)


def serve(llm: LLM, request: Request, before_step: Callable[[int], None] | None = None) -> Served:
    """Runs a request; stalls are what its steps took beside the forward."""
    served = Served()
    with llm.engine.start(request) as run:
        while not run.finished:
            if before_step is not None:
                before_step(len(served.stalls))
            began, forwards = time.perf_counter(), forward_seconds(run)
            served.token_ids += run.step().token_ids
            elapsed = time.perf_counter() - began
            served.stalls.append(elapsed - (forward_seconds(run) - forwards))
            time.sleep(0.002)  # a draft worker on a busy machine has to get its turn
    served.accepted = run.stats.accepted_by_drafter
    return served


def forward_seconds(run: RequestRun) -> float:
    """What the target's forwards for a request have taken."""
    return run.stats.prefill_seconds + run.stats.target_seconds


def leaked_blocks(llm: LLM) -> int:
    """1 if the target's cache is not idle."""
    runner = llm.engine.target.runner
    assert isinstance(runner, ModelRunner)
    try:
        runner.cache.check_idle()
    except AssertionError:
        return 1
    return 0


def children() -> list[int]:
    """Processes that this one started and that still run."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                found.append(int(folder.name))
    return found


def report(tally: Tally, rounds: int) -> None:
    result: dict[str, Any] = {
        "rounds": rounds,
        "faults": dict(tally.faults),
        "rounds_identical": tally.identical,
        "rounds_recovered": tally.recovered,
        "longest_recovery_s": round(tally.longest_recovery, 2),
        "largest_stall_ms": round(1e3 * tally.largest_stall, 1),
        "largest_stall_of_plain_decoding_ms": round(1e3 * tally.largest_plain_stall, 1),
        "steps": tally.steps,
        "steps_stalled_over_250_ms": tally.steps_over_250_ms,
        "leaked_sessions": tally.leaked_sessions,
        "rounds_with_leaked_kv_blocks": tally.leaked_kv_blocks,
        "leaked_processes": tally.leaked_processes,
        "leaked_file_descriptors": tally.leaked_files,
    }
    finish({"faults": result, **conditions()})
    leaks = sum(value for name, value in result.items() if "leaked" in name)
    sys.exit(bool(leaks) or not tally.identical == tally.recovered == rounds)


if __name__ == "__main__":
    main()
