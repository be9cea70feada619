"""A model on two devices: against one, against itself, and when a rank is lost."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import NoReturn

import pytest
import torch
from forwards import bushy_tree, chunked_logits, random_ids, verify
from gpu.setup import Figures, Setup, assert_no_worse, ratio_of_errors
from gpu.whole_models import chunks_of, is_changed, on_cpu, on_device, random_model, seconds_of

from outrider.actors.model_runner import ModelRunner
from outrider.cluster.tensor_group import LocalRanks
from outrider.models.block_pool import blocks_for
from outrider.models.demo import pair
from outrider.models.device import CPU, CUDA
from outrider.models.numerics import MAX_ROWS, Numerics
from outrider.speculation.errors import TargetGroupError
from outrider.speculation.tree import DraftTree

NOTICED_SECONDS = 5.0
"""Most time between a rank's death and an error."""
TEXTS = 4
"""That speculation must not change."""


def check_two_ranks(setup: Setup) -> Figures:
    """Runs of each size have the bits of another run of that size; two ranks are as exact as one.

    With ``canonical`` speculation changes no text of two ranks. The death of a rank ends its group soon.
    """
    if setup.device == "cuda" and torch.cuda.device_count() < 2:
        print("check_two_ranks did nothing: this process sees fewer than two CUDA devices.")
        return {"ran": False}
    ratios, milliseconds, noticed = {}, {}, 0.0
    with random_model(setup) as (folder, _):
        for path in pair.TARGET.glob("tokenizer*"):
            shutil.copy(path, folder)
        exact, _ = chunked_logits(
            on_cpu(folder, torch.float64), random_ids(setup.text), chunks_of(setup.text)
        )
        for numerics in Numerics:
            one = _logits(on_device(folder, setup, numerics), setup)
            runner = on_device(folder, setup, numerics)
            _assert_equal(_logits(runner, setup), one)
            milliseconds[f"{numerics}, 1"] = _step_ms(runner)
            with _two(folder, setup, numerics) as (runner, _):
                two = _logits(runner, setup)
                _assert_equal(_logits(runner, setup), two)
                milliseconds[f"{numerics}, 2"] = _step_ms(runner)
                if numerics is Numerics.CANONICAL:
                    assert not any(is_changed(runner, setup, sample) for sample in range(TEXTS))
            with _two(folder, setup, numerics) as (runner, ranks):
                _assert_equal(_logits(runner, setup), two)
                noticed = max(noticed, _seconds_to_notice(runner, ranks))
            ratios[str(numerics)] = ratio_of_errors(two[0].to(CPU), one[0].to(CPU), exact)
    assert noticed < NOTICED_SECONDS, noticed
    return {**assert_no_worse(ratios), "ms_of_a_step": milliseconds, "death_noticed_s": round(noticed, 3)}


@contextmanager
def _two(folder: Path, setup: Setup, numerics: Numerics) -> Iterator[tuple[ModelRunner, LocalRanks]]:
    ranks = LocalRanks(
        str(folder),
        2,
        dtype="bfloat16",
        numerics=numerics,
        max_model_len=setup.model["max_position_embeddings"],
        device=CUDA if setup.device == "cuda" else CPU,
    )
    assert ranks.leader is not None
    try:
        num_blocks = 4 * blocks_for(ranks.leader.max_model_len + MAX_ROWS)
        yield ModelRunner(ranks.leader, num_blocks=num_blocks), ranks
    finally:
        ranks.close()


def _logits(runner: ModelRunner, setup: Setup) -> list[torch.Tensor]:
    """Of a text in chunks, and of a tree behind it."""
    text, sequence = chunked_logits(runner, random_ids(setup.text), chunks_of(setup.text))
    drafted = verify(runner, sequence, 7, bushy_tree(random_ids(2), junk=1)[0])
    sequence.close()
    return [text, drafted]


def _assert_equal(again: list[torch.Tensor], before: list[torch.Tensor]) -> None:
    assert all(torch.equal(*each) for each in zip(again, before, strict=True))


def _step_ms(runner: ModelRunner) -> float:
    _, sequence = chunked_logits(runner, random_ids(1), [1])
    ms = 1e3 * seconds_of(runner, sequence, DraftTree.empty())
    sequence.close()
    return round(ms, 3)


def _seconds_to_notice(runner: ModelRunner, ranks: LocalRanks) -> float:
    """From the death of rank 1, in the midst of steps, to the error."""
    killed: list[float] = []

    def kill() -> None:
        killed.append(time.perf_counter())
        os.kill(ranks.pids[0], signal.SIGKILL)

    Timer(0.3, kill).start()
    with pytest.raises(TargetGroupError, match="rank 1 of the tensor-parallel target was killed by signal 9"):
        _step_for_ever(runner)
    return time.perf_counter() - killed[0]


def _step_for_ever(runner: ModelRunner) -> NoReturn:
    _, sequence = chunked_logits(runner, random_ids(1), [1])
    while True:
        verify(runner, sequence, 5, DraftTree.empty())
        sequence.length -= 1
