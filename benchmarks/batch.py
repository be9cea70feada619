"""A batch job that is killed again and again, and what a job costs beside its engine.

    python benchmarks/batch.py [--rows 10000] [--kills 10] [--pairs 9] [--pair-rows 400]

The embedded draft model is the target, n-grams draft. First a job of ``--rows`` short rows runs as a command
that is killed (SIGKILL) at random moments and started again; no row may be missing or stand there twice, and
all tokens must be those of a job that ran through. Then ``--pairs`` times, interleaved, a job and the
engine driven directly serve the same ``--pair-rows`` longer requests; the ratio is of tokens per second.
Exits with 1 if a row is missing, stands there twice or has other tokens.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import conditions, finish

from outrider import LLM, SamplingParams
from outrider.actors.running_batch import RunningBatch
from outrider.cluster.bench.machine import seconds_of
from outrider.cluster.bench.report import median_ratio
from outrider.cluster.cli.main import main as outrider
from outrider.models.demo import pair
from outrider.speculation.request import Request

CONTEXT, MAX_NUM_SEQS = 256, 16
SECONDS = 600.0
SPECULATION = {"method": "ngram"}
SHORT, LONG = (1, 9), (4, 49)
"""Tokens of a row, from and below: where rows count, and where tokens do."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--pair-rows", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_rows(folder / "in.jsonl", args.rows, SHORT)
        result: dict[str, Any] = {"rows": args.rows, **killed(source, folder, args.kills)}
        print(result, file=sys.stderr, flush=True)
        some = write_rows(folder / "some.jsonl", args.pair_rows, LONG, seeded=True)
        result["job_over_engine"] = compare(some, folder / "paired.jsonl", args.pairs)
    finish({**result, **conditions()})
    sys.exit(bool(result["missing"] or result["double"] or result["differing"]))


def write_rows(path: Path, count: int, tokens: tuple[int, int], *, seeded: bool = False) -> Path:
    """Rows of so many tokens, one in four with two choices. seeded: they bring seeds of their own."""
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            body = {
                "prompt": f"def f{number}(",
                "max_tokens": int(rng.integers(*tokens)),
                "n": 1 + (number % 4 == 0),
                "temperature": 0.8,
                "ignore_eos": True,
                "return_token_ids": True,
                "seed": number if seeded else None,
            }
            row = {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(row) + "\n")
    return path


def words(source: Path, output: Path) -> list[str]:
    given = ["run-batch", "-i", str(source), "-o", str(output), "--model", str(pair.DRAFT)]
    limits = ["--max-model-len", str(CONTEXT), "--max-num-seqs", str(MAX_NUM_SEQS), "--threads", "1"]
    return [*given, *limits, "-sc", json.dumps(SPECULATION)]


def killed(source: Path, folder: Path, kills: int) -> dict[str, Any]:
    """Kills at that many evenly drawn parts of the job, then lets it end."""
    output, whole = folder / "out.jsonl", folder / "whole.jsonl"
    rows = source.read_bytes().count(b"\n")
    torn, began = 0, time.monotonic()
    for part in sorted(np.random.default_rng().random(kills).tolist()):
        process = subprocess.Popen(command(source, output), stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + SECONDS
        before = lines_of(output)
        # At least one more row, else two kills that lie close together would be one.
        while lines_of(output) < max(before + 1, part * rows) and process.poll() is None:
            assert time.monotonic() < deadline, "the job stands still"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        torn += not output.read_bytes().endswith(b"\n")
    for path in (output, whole):
        subprocess.run(command(source, path), check=True, stderr=subprocess.DEVNULL)
    found, expected = tokens_of(output), tokens_of(whole)
    ids = [custom_id for custom_id, _ in found]
    by_id = dict(found)
    return {
        "kills": kills,
        "seconds": round(time.monotonic() - began, 1),
        "torn_lines": torn,
        "missing": rows - len(set(ids)),
        "double": len(ids) - len(set(ids)),
        "differing": sum(by_id.get(name) != tokens for name, tokens in expected),
    }


def compare(source: Path, output: Path, pairs: int) -> dict[str, float]:
    """Tokens per second of a job over those of a loop over the engine's steps; the same tokens."""
    from outrider.cluster.api.service import ModelSettings, OfferedModel
    from outrider.cluster.batch_files.job import BatchJob, JobOptions
    from outrider.cluster.batch_files.lines import InputFile
    from outrider.cluster.batch_files.results import ResultFile

    with LLM(
        str(pair.DRAFT), speculative_config=SPECULATION, max_model_len=CONTEXT, max_num_seqs=MAX_NUM_SEQS
    ) as llm:
        model = OfferedModel(llm.describe(), ModelSettings(names=("x",)))
        bodies = [json.loads(line)["body"] for line in source.read_bytes().splitlines()]

        def job() -> None:
            lines, results = InputFile(source), ResultFile(output, overwrite=True)
            earlier = results.begin({})
            options = JobOptions(seed=0)
            BatchJob(llm, model, lines, results, earlier, options, lambda _: None).run()
            lines.close()
            results.close()

        def engine() -> None:
            drive(llm, [request for body in bodies for request in requests_of(llm, body)])

        ways = [job, engine]
        taken: dict[Callable[[], None], list[float]] = {way: [] for way in ways}
        for number in range(pairs + 1):
            # Who comes first alternates, for a machine grows slower as it grows warm.
            for way in ways if number % 2 else reversed(ways):
                taken[way].append(seconds_of(way))
    # The first pair warms up.
    return median_ratio(taken[engine][1:], taken[job][1:])


def requests_of(llm: LLM, body: dict[str, Any]) -> list[Request]:
    names = ("max_tokens", "n", "temperature", "ignore_eos", "seed")
    params = SamplingParams(**{name: body[name] for name in names})
    return llm.prepare(body["prompt"], params)[1]


def drive(llm: LLM, requests: Sequence[Request]) -> None:
    batch = RunningBatch(llm.engine, MAX_NUM_SEQS)
    for request in requests:
        batch.submit(request)
    while batch.num_running + batch.num_waiting:
        batch.step()


def command(source: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", outrider.__module__, *words(source, output)]


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def tokens_of(path: Path) -> list[tuple[str, list[list[int]]]]:
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [
        (each["custom_id"], [choice["token_ids"] for choice in each["response"]["body"]["choices"]])
        for each in rows
    ]


if __name__ == "__main__":
    main()
