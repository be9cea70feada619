"""A step of so many rows, here and in llama.cpp, with the same weights.

    python -m venv llama && llama/bin/pip install --no-binary llama-cpp-python llama-cpp-python gguf
    python benchmarks/llama.py --python llama/bin/python [--rows 1 4 8 16 32] [--context 256] [--turns 15]

The embedded target, inflated, in bfloat16, on one thread each. llama.cpp runs in a process of its own, in an
environment of its own (``llama_peer.py``); the two take turns, and one waits while the other computes.
Both give logits of every row. Nothing else should run meanwhile.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import conditions, finish
from step import Model, add_step_arguments

from outrider.cluster.bench.machine import seconds_of
from outrider.models.demo import pair
from outrider.models.inflate import inflated

PEER = Path(__file__).with_name("llama_peer.py")


class Peer:
    """llama.cpp with a model and a text of so many tokens."""

    def __init__(self, python: Path, folder: Path, context: int) -> None:
        self._process = subprocess.Popen(
            [str(python), str(PEER), str(folder), str(context)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.version: str = self._receive()

    def step(self, rows: int) -> tuple[float, list[int]]:
        """Seconds of a step below the text, and every row's first choice."""
        assert self._process.stdin is not None
        print(rows, file=self._process.stdin, flush=True)
        seconds, choices = self._receive()
        return seconds, choices

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"llama.cpp's process ended with exit code {self._process.wait()}")
        return json.loads(line)


def compare(model: Model, peer: Peer, rows: int, turns: int) -> dict[str, Any]:
    """Medians in ms, the median of the turns' ratios, and the share of rows with the same first choice."""
    ours, theirs = [], []
    for _ in range(turns + 1):
        ours.append(seconds_of(lambda: model.step(rows)))
        seconds, choices = peer.step(rows)
        theirs.append(seconds)
    same = np.array(choices) == model.step(rows).argmax(-1).numpy()
    a, b = np.array(ours[1:]), np.array(theirs[1:])  # the first turn warms up
    return {
        "ms": {
            "outrider": round(float(np.median(a)) * 1e3, 3),
            "llama.cpp": round(float(np.median(b)) * 1e3, 3),
        },
        "llama.cpp over outrider": round(float(np.median(b / a)), 3),
        "same first choice": round(float(same.mean()), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--python", type=Path, required=True, help="of an environment with llama-cpp-python and gguf"
    )
    add_step_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with inflated(pair.TARGET, args.parameters) as folder, torch.inference_mode():
        model = Model(folder, args.context)
        peer = Peer(args.python, folder, args.context)
    by_rows = {}
    for rows in args.rows:
        by_rows[rows] = compare(model, peer, rows, args.turns)
        print(f"{rows} rows: {by_rows[rows]}")
    peer.close()
    finish(
        {
            "rows": by_rows,
            "llama-cpp-python": peer.version,
            "context": args.context,
            **conditions(dtype="bfloat16"),
        }
    )


if __name__ == "__main__":
    main()
