"""What every benchmark shares: the conditions it ran under, paired ratios, and a JSON last line."""

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from outrider.models.inflate import inflate


def conditions(**more: Any) -> dict[str, Any]:
    """Machine, versions, threads and command."""
    return {
        "command": "python " + " ".join(sys.argv),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "threads": torch.get_num_threads(),
        **more,
    }


@contextmanager
def inflated(source: Path, parameters: int) -> Iterator[Path]:
    """A folder with the model blown up to so many parameters, for as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "target"
        inflate(source, target, parameters=parameters)
        yield target


def _cpu_name() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def seconds_of(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def median_ratio(numerator: Sequence[float], denominator: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Median of the paired ratios with a 95 % bootstrap interval."""
    ratios = np.array(numerator) / np.array(denominator)
    rng = np.random.default_rng(seed)
    resampled = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {
        "median": round(float(np.median(ratios)), 3),
        "low": round(float(low), 3),
        "high": round(float(high), 3),
        "pairs": len(ratios),
    }


def finish(result: dict[str, Any]) -> None:
    """The last line of standard output."""
    print(json.dumps(result))
