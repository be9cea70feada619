"""Drafting goes on where steps with it were faster, and is stopped, and tried again, where they were not."""

import numpy as np
import pytest

from outrider.speculation.pipelines.track_record import (
    ELSEWHERE_FIRST,
    FIRST_PAUSE,
    FIRST_PLAIN,
    REFRESH,
    TRIAL,
    TrackRecord,
)

PLAIN_SECONDS = 0.05


def serve(
    record: TrackRecord, batch: int, steps: int, *, speedup: float, seed: int = 0, noise: float = 0.0
) -> list[bool]:
    """Which of so many steps drafted, where drafting brings ``speedup`` times the tokens per second."""
    rng, drafted = np.random.default_rng(seed), []
    for _ in range(steps):
        drafted.append(record.allows(batch, with_texts=False))
        tokens = batch * (3 if drafted[-1] else 1)
        rate = batch / PLAIN_SECONDS * (speedup if drafted[-1] else 1.0) * (1 + noise * rng.normal())
        record.observe(
            batch, drafted=drafted[-1], tokens=tokens, seconds=tokens / rate, plain_seconds=PLAIN_SECONDS
        )
    return drafted


def test_plain_steps_come_first_for_comparison() -> None:
    drafted = serve(TrackRecord(), 4, FIRST_PLAIN + 1, speedup=2.0)
    assert drafted == [False] * FIRST_PLAIN + [True]


def test_what_is_faster_goes_on_but_for_a_plain_step_now_and_then() -> None:
    drafted = serve(TrackRecord(), 4, 1000, speedup=1.5, noise=0.1)
    assert 1000 // REFRESH <= drafted.count(False) < 1000 // REFRESH + 5


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_what_is_slower_costs_ever_less(batch: int) -> None:
    record = TrackRecord()
    drafted = serve(record, batch, 4000, speedup=0.7, noise=0.05)
    assert drafted[: FIRST_PLAIN + TRIAL].count(True) == TRIAL
    assert 0 < drafted[100:1000].count(True) <= 3 * TRIAL
    assert 0 < drafted[3000:].count(True) <= TRIAL, "it is still tried, and seldom"


def test_what_gains_too_little_is_not_worth_its_trials() -> None:
    assert serve(TrackRecord(), 4, 1000, speedup=1.02).count(True) < 60


def test_drafting_that_becomes_faster_is_found_out() -> None:
    record = TrackRecord()
    serve(record, 4, 500, speedup=0.5)
    assert serve(record, 4, 2000, speedup=2.0)[-100:].count(True) >= 99


def test_a_drafter_elsewhere_is_compared_later_and_stopped_only_if_slower() -> None:
    record = TrackRecord(elsewhere=True)
    drafted = serve(record, 4, 1000, speedup=1.1)
    assert drafted.index(False) == ELSEWHERE_FIRST
    assert drafted.count(False) <= 4
    assert not record.has_stopped(4)
    record = TrackRecord(elsewhere=True)
    drafted = serve(record, 4, 4000, speedup=0.8, noise=0.05)
    assert record.has_stopped(4)
    assert 0 < drafted[ELSEWHERE_FIRST:].count(True) < 60
    assert 0 < drafted[3000:].count(True) <= TRIAL


def test_batch_sizes_are_judged_apart() -> None:
    record = TrackRecord()
    for _ in range(10):
        serve(record, 1, 50, speedup=2.0)
        serve(record, 32, 50, speedup=0.5)
    assert record.allows(1, with_texts=False)
    assert not record.allows(32, with_texts=False)


def test_what_does_not_pay_for_fewer_is_not_tried_at_once_for_more() -> None:
    record = TrackRecord()
    serve(record, 16, 500, speedup=0.9)
    pause = serve(record, 32, 1000, speedup=2.0).index(True)
    assert pause > 4 * FIRST_PAUSE
    assert record.allows(32, with_texts=False), "a trial that comes later still counts"
    assert serve(record, 8, 20, speedup=2.0).count(True) > 10, "of fewer it says nothing"


def test_steps_with_texts_are_no_trials() -> None:
    record = TrackRecord()
    serve(record, 4, FIRST_PLAIN, speedup=1.0)
    assert record.allows(4, with_texts=False)
    assert not record.allows(4, with_texts=True)
    serve(record, 4, 50, speedup=2.0)
    assert record.allows(4, with_texts=True)
