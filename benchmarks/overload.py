"""A server that is offered several times what it can do: who is refused, what the others get, and after.

    python benchmarks/overload.py [--seconds 60] [--times 5]

Starts ``outrider serve`` with the demo pair. peak: as many clients as it has seats, each asking again once
it has its answer. disconnect: seconds from a client's going away in a stream until nothing is held for it,
asked for as /status. overload: calls at ``times`` the peak's rate, whatever comes back. recovery: one call
after the other until one takes no longer than twice what it takes on an idle server.

Fails where an answer is neither a text nor 429 or 503 with Retry-After. Clients share the machine with the
server, so figures are for comparing the parts of one run.
"""

import argparse
import asyncio
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from common import conditions, finish

PROMPT = "def fibonacci(n):\n    "
PROBES = 5
DISCONNECTS = 15
LONG = 1000
"""Tokens of a stream that nobody reads to its end."""
RSS_SECONDS = 0.5
LOOK_SECONDS = 0.05
"""Between two looks at whether the peak has been seen long enough."""
RECOVERED = 2.0
"""Times its duration on an idle server, at which a call counts as served normally."""
GIVE_UP_SECONDS = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload; a third of it for the peak")
    parser.add_argument("--times", type=float, default=5.0, help="the offered rate over the peak's")
    parser.add_argument("--tokens", type=int, default=64, help="of each text")
    parser.add_argument("--seats", type=int, default=8, help="max_num_seqs of the server")
    args = parser.parse_args()
    with server(args.seats) as (process, url):
        results = asyncio.run(measured(args, process.pid, url))
    finish({**results, **conditions(**vars(args))})
    sys.exit(0 if results["only_expected_answers"] else 1)


@contextmanager
def server(seats: int) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A live one, and its address."""
    words = ["serve", "--port", "0", "--max-num-seqs", str(seats)]
    process = subprocess.Popen(
        [sys.executable, "-m", "outrider.cluster.cli.main", *words], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        found = next(filter(None, (re.search(r"served at (\S+)", line) for line in process.stderr)))
        # Nobody reads the access log; a full pipe would hold the server back.
        with open(os.devnull, "w") as nowhere:
            drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=nowhere)
            yield process, found[1]
            drain.kill()
    finally:
        process.terminate()
        process.wait()


@dataclass
class Answers:
    """What came back, each with its seconds."""

    statuses: Counter[int] = field(default_factory=Counter)
    tokens: int = 0
    served: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    without_advice: int = 0
    """Refusals that do not say when to come again."""

    @property
    def as_expected(self) -> bool:
        return self.without_advice == 0 and set(self.statuses) <= {200, 429, 503}


async def measured(args: argparse.Namespace, pid: int, url: str) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=GIVE_UP_SECONDS, limits=limits) as client:
        idle = Answers()
        for _ in range(PROBES):
            await ask(client, args.tokens, idle)
        normal = statistics.median(idle.served)
        freed = [await seconds_until_free(client) for _ in range(DISCONNECTS)]
        peak = Answers()
        peak_seconds = await at_peak(client, args, peak)
        memory: list[int] = []
        watching = asyncio.ensure_future(watch_memory(pid, memory))
        rate = args.times * len(peak.served) / peak_seconds
        overload = Answers()
        tokens = await overloaded(client, args, overload, rate)
        recovery = await recovered(client, args.tokens, RECOVERED * normal)
        watching.cancel()
    peak_rate, goodput = peak.tokens / peak_seconds, tokens / args.seconds
    return {
        "disconnect_frees_seconds_median": middle(freed),
        "disconnect_frees_seconds_longest": max(freed),
        "peak_tokens_per_second": peak_rate,
        "offered_calls_per_second": rate,
        "goodput_tokens_per_second": goodput,
        "goodput_over_peak": goodput / peak_rate,
        "statuses": dict(overload.statuses),
        "only_expected_answers": overload.as_expected and peak.as_expected,
        "served_seconds_median": middle(overload.served),
        "refused_seconds_median": middle(overload.refused),
        "refused_seconds_p99": percentile(overload.refused, 0.99),
        "idle_seconds_median": normal,
        "recovery_seconds": recovery,
        "rss_mib": [round(each / 2**20) for each in memory],
        "rss_growth_mib": (memory[-1] - memory[0]) / 2**20,
    }


async def ask(client: httpx.AsyncClient, tokens: int, answers: Answers) -> None:
    """One call. Texts differ, so that no prefix cache helps with more than the prompt."""
    began = time.perf_counter()
    body = {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "temperature": 1.0}
    reply = await client.post("/v1/completions", json=body)
    seconds = time.perf_counter() - began
    answers.statuses[reply.status_code] += 1
    if reply.status_code == 200:
        answers.served.append(seconds)
        answers.tokens += reply.json()["usage"]["completion_tokens"]
    else:
        answers.refused.append(seconds)
        answers.without_advice += not reply.headers.get("retry-after", "").isdecimal()


async def seconds_until_free(client: httpx.AsyncClient) -> float:
    """From the moment that the only client goes away until no seat and no KV block is taken."""
    body = {"prompt": PROMPT, "max_tokens": LONG, "ignore_eos": True, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        lines = reply.aiter_lines()
        await anext(lines)
        assert await is_busy(client)
        began = time.perf_counter()
    while await is_busy(client):
        assert time.perf_counter() - began < GIVE_UP_SECONDS, "nothing is freed"
    return time.perf_counter() - began


async def is_busy(client: httpx.AsyncClient) -> bool:
    (model,) = (await client.get("/status")).json()["models"]
    return bool(model["running"] or model["waiting"] or model["kv_cache_usage"])


async def at_peak(client: httpx.AsyncClient, args: argparse.Namespace, answers: Answers) -> float:
    """Every seat taken, nobody waiting: seconds in which the answers came, at least one for each seat.

    What is under way at the end does not count.
    """

    async def keep_asking() -> None:
        while True:
            await ask(client, args.tokens, answers)

    began = time.perf_counter()
    clients = [asyncio.ensure_future(keep_asking()) for _ in range(args.seats)]
    while time.perf_counter() - began < args.seconds / 3 or len(answers.served) < args.seats:
        await asyncio.sleep(LOOK_SECONDS)
    seconds = time.perf_counter() - began
    for each in clients:
        each.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    return seconds


async def overloaded(
    client: httpx.AsyncClient, args: argparse.Namespace, answers: Answers, rate: float
) -> int:
    """Calls at a fixed rate, all of them answered in the end; tokens that came while they were made."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    calls = []
    while (due := len(calls) / rate) < args.seconds:
        await asyncio.sleep(max(0.0, began + due - loop.time()))
        calls.append(asyncio.ensure_future(ask(client, args.tokens, answers)))
    await asyncio.sleep(max(0.0, began + args.seconds - loop.time()))
    tokens = answers.tokens
    await asyncio.gather(*calls)
    return tokens


async def recovered(client: httpx.AsyncClient, tokens: int, seconds: float) -> float | None:
    """Until a call takes at most so long; None if none does."""
    began = time.perf_counter()
    while time.perf_counter() - began < GIVE_UP_SECONDS:
        answers = Answers()
        await ask(client, tokens, answers)
        if answers.served and answers.served[0] <= seconds:
            return time.perf_counter() - began
    return None


async def watch_memory(pid: int, memory: list[int]) -> None:
    """Bytes of a process that are in memory."""
    while True:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        memory.append(pages * os.sysconf("SC_PAGE_SIZE"))
        await asyncio.sleep(RSS_SECONDS)


def middle(seconds: Sequence[float]) -> float | None:
    return statistics.median(seconds) if seconds else None


def percentile(seconds: Sequence[float], share: float) -> float | None:
    return sorted(seconds)[int(share * (len(seconds) - 1))] if seconds else None


if __name__ == "__main__":
    main()
