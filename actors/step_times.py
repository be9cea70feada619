"""What a target step costs by rows, measured before the first request or read from a file."""

import json
import time
from pathlib import Path
from statistics import median

import numpy as np

from outrider.actors.runner import AnySequence, TargetRunner, TreeQuery
from outrider.speculation.errors import InvalidConfigError
from outrider.speculation.step_cost import isotonic
from outrider.speculation.tree import DraftTree, Law
from outrider.speculation.types import FloatArray

ROWS = (1, 2, 4, 8, 16, 32, 64)
REPEATS = 3
TEXT = 32
"""Tokens that the measured steps have cached."""


def measured_step_times(
    runner: TargetRunner[AnySequence], max_rows: int, *, seconds: float = 2.0
) -> FloatArray:
    """Seconds ``[R]`` of a step with 1, 2, ... R rows, R at most ``max_rows``.

    Row counts that would take the measuring beyond ``seconds`` are left out.
    """
    began, knots, times = time.perf_counter(), list[int](), list[float]()
    _timed(runner, 1)
    for rows in (each for each in ROWS if each <= max_rows):
        if knots and time.perf_counter() - began + 2 * REPEATS * times[-1] > seconds:
            break
        knots.append(rows)
        times.append(median(_timed(runner, rows) for _ in range(REPEATS)))
    rising = isotonic(times, [1.0] * len(times))
    return np.interp(np.arange(1, knots[-1] + 1), knots, rising)


def saved_step_times(path: Path, runner: TargetRunner[AnySequence], max_rows: int) -> FloatArray:
    """What the file says, or what is measured and then written to it.

    Raises:
        InvalidConfigError: the file holds something else, or cannot be written.
    """
    try:
        if path.exists():
            return _read(path)
        times = measured_step_times(runner, max_rows)
        path.write_text(json.dumps({"step_seconds": times.tolist()}) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidConfigError(f"target_profile {path}: {error.strerror}") from None
    return times


def _read(path: Path) -> FloatArray:
    try:
        times = np.array(json.loads(path.read_text(encoding="utf-8"))["step_seconds"], np.float64)
    except (ValueError, KeyError, TypeError):
        times = np.zeros(0)
    if times.ndim != 1 or not len(times) or not times[0] > 0 or not (np.diff(times) >= 0).all():
        raise InvalidConfigError(
            f"target_profile {path} must hold step_seconds, positive numbers that do not decrease"
        )
    return times


def _timed(runner: TargetRunner[AnySequence], rows: int) -> float:
    text = np.zeros(TEXT + 1, np.int64)
    sequence = runner.open(text)
    assert sequence is not None
    try:
        sequence.reserve(TEXT + 1 + rows)
        runner.verify([TreeQuery(sequence=sequence, tokens=text[:-1], tree=None)])
        tree = DraftTree(
            tokens=np.zeros(rows - 1, np.int64),
            parent_indices=np.full(rows - 1, -1, np.int64),
            scores=np.ones(rows - 1),
            law=Law.DETERMINISTIC,
        )
        began = time.perf_counter()
        (logits,) = runner.verify([TreeQuery(sequence=sequence, tokens=text[-1:], tree=tree)])
        # A device is still at work until a number has come back.
        logits[0, 0].item()
        return time.perf_counter() - began
    finally:
        sequence.close()
