"""What HTTP costs: streams of a server against the same engine driven directly.

    python benchmarks/http_streams.py [--cluster cluster.yaml]

throughput: concurrent streams, tokens per second over those of ``LLM.generate`` with the same prompts, pairs
of runs alternating. first_token: of an idle server, seconds more than the engine itself takes. The embedded
pair, one thread for the engine on each side; the client has the other core. With ``--cluster`` the server is
Ray Serve's and its target's settings are the file's.
"""

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import torch
from common import conditions, finish

from outrider import LLM, SamplingParams
from outrider.cluster.bench.machine import seconds_of
from outrider.cluster.bench.report import median_ratio
from outrider.models.demo import corpus

CONTEXT = 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cluster", help="a cluster.yaml, in place of a server in one process")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    prompts = corpus.held_out_prompts(args.streams)
    with (
        server(args.cluster, args.streams) as url,
        LLM(max_model_len=CONTEXT, max_num_seqs=args.streams) as llm,
    ):
        result = {
            "throughput": throughput(llm, url, prompts, args),
            "first_token": first_token(llm, url, prompts[0], args.pairs),
        }
    finish({**result, **conditions(streams=args.streams, tokens=args.tokens, cluster=args.cluster)})


@contextmanager
def server(cluster: str | None, streams: int) -> Iterator[str]:
    """``outrider serve`` on a free port; where it is reached."""
    here = ["--threads", "1", "--max-model-len", str(CONTEXT), "--max-num-seqs", str(streams)]
    port = ["--port", "8765" if cluster else "0"]
    words = [*([cluster] if cluster else here), *port]
    process = subprocess.Popen(
        [sys.executable, "-m", "outrider.cluster.cli.main", "serve", *words],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.search(r"http://\S+", line)
    assert found is not None, line
    drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
    try:
        yield found[0]
    finally:
        process.terminate()
        process.wait()
        drain.wait()


def throughput(llm: LLM, url: str, prompts: list[str], args: argparse.Namespace) -> dict[str, Any]:
    params = SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True)
    body = {"temperature": 0.0, "max_tokens": args.tokens, "ignore_eos": True}
    direct, through, same = [], [], True
    for pair in range(args.pairs + 1):
        began = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - began
        began = time.perf_counter()
        texts = asyncio.run(all_streams(url, prompts, body))
        over_http = time.perf_counter() - began
        same &= texts == [output.outputs[0].text for output in outputs]
        if pair:  # the first one warms both up
            direct.append(seconds)
            through.append(over_http)
    tokens = args.tokens * len(prompts)
    return {
        "ratio": median_ratio(direct, through),
        "direct_tokens_per_second": round(tokens / statistics.median(direct), 1),
        "http_tokens_per_second": round(tokens / statistics.median(through), 1),
        "same_texts": same,
    }


def first_token(llm: LLM, url: str, prompt: str, pairs: int) -> dict[str, float]:
    direct, through = [], []
    for _ in range(pairs):
        params = SamplingParams(temperature=0.0, max_tokens=2)
        direct.append(seconds_of(lambda: next(iter(llm.stream(prompt, params)))))  # noqa: B023
        through.append(asyncio.run(until_first(url, prompt)))
    return {
        "direct_ms": round(1e3 * statistics.median(direct), 2),
        "http_ms": round(1e3 * statistics.median(through), 2),
        "difference_ms": round(1e3 * (statistics.median(through) - statistics.median(direct)), 2),
    }


async def all_streams(url: str, prompts: list[str], body: dict[str, Any]) -> list[str]:
    async with httpx.AsyncClient(timeout=300) as client:
        return await asyncio.gather(*(one_stream(client, url, {**body, "prompt": each}) for each in prompts))


async def one_stream(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> str:
    text = ""
    async with client.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    return text


async def until_first(url: str, prompt: str) -> float:
    """Seconds; the connection stands before."""
    async with httpx.AsyncClient(timeout=300) as client:
        await client.get(f"{url}/version")
        body = {"prompt": prompt, "temperature": 0.0, "max_tokens": 2, "stream": True}
        began = time.perf_counter()
        async with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
            async for _ in reply.aiter_lines():
                return time.perf_counter() - began
    raise AssertionError("the stream is empty")


if __name__ == "__main__":
    main()
