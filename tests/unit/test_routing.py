"""Where requests are drafted for, on plain numbers."""

from itertools import pairwise

import pytest

from outrider.speculation.replication.routing import (
    CLEARLY,
    LOOK_EVERY,
    PATIENCE,
    TRIAL_PAUSE,
    Mover,
    Standing,
    choose,
    slowdown,
)


def worker(
    milliseconds: float | None,
    sessions: int = 0,
    room: int = 16,
    *,
    last: float | None = None,
    **more: bool,
) -> Standing:
    return Standing(
        alone=None if milliseconds is None else milliseconds / 1e3,
        sessions=sessions,
        room=room,
        last=milliseconds / 1e3 if milliseconds is not None else last,
        **more,
    )


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        ([worker(None), worker(None)], 0),
        ([worker(None, 1), worker(None)], 1),
        ([worker(None, 4, 8), worker(None, 5, 16)], 1),
        ([worker(20), worker(10)], 1),
        ([worker(20), worker(10, 3)], 1),
        ([worker(20), worker(10, 5)], 0),
        ([worker(20), worker(None)], 1),
        ([worker(20), worker(None, 1)], 0),
        ([worker(20), worker(10), worker(None)], 2),
        ([worker(20), worker(10, avoided=True)], 0),
        ([worker(20, avoided=True), worker(10, avoided=True)], 1),
    ],
    ids=str,
)
def test_a_request_goes_where_it_should_be_fastest(workers: list[Standing], expected: int) -> None:
    assert choose(workers) == expected


def test_requests_spread_in_proportion_to_speed() -> None:
    """Each was placed with all that is known when it came."""
    counts = [0, 0]
    for _ in range(18):
        counts[choose([worker(10, counts[0]), worker(20, counts[1])])] += 1
    assert counts == [13, 5]


def looks(workers: dict[str, Standing], seconds: float, mover: Mover | None = None) -> list[tuple[str, str]]:
    """Moves that are decided within so many seconds, if nothing changes."""
    mover, moves, now = mover or Mover(), [], 0.0
    while now <= seconds:
        if mover.is_due(now) and (move := mover.look(workers, now)):
            moves.append(move)
        now += LOOK_EVERY / 5
    return moves


def test_a_request_leaves_a_worker_that_is_clearly_slower_for_long() -> None:
    workers = {"slow": worker(40, 1), "fast": worker(20), "middle": worker(25)}
    assert looks(workers, PATIENCE - 0.1) == []
    assert looks(workers, PATIENCE + LOOK_EVERY) == [("slow", "fast")]


@pytest.mark.parametrize(
    "workers",
    [
        {"a": worker(29, 1), "b": worker(20)},
        {"a": worker(6, 1), "b": worker(2)},
        {"a": worker(40, 1), "b": worker(20, 4)},
        {"a": worker(40, 1), "b": worker(10, 2, 2)},
        {"a": worker(40, 1), "b": worker(10, avoided=True)},
        {"a": worker(40, 1, settled=False), "b": worker(10)},
        {"a": worker(40, 1), "b": worker(None, last=0.03)},
        {"a": worker(None, 1, last=0.04), "b": worker(10)},
        {"a": worker(40), "b": worker(10)},
        {"a": worker(40, 1)},
        {},
    ],
    ids=[
        "not clearly faster", "too little to gain", "busy", "full", "failed lately", "just opened",
        "forgotten", "not measured", "nobody to move", "alone", "none",
    ],
)  # fmt: skip
def test_a_request_stays(workers: dict[str, Standing]) -> None:
    assert looks(workers, 10 * PATIENCE) == []


def test_a_worker_that_was_faster_for_a_moment_draws_nobody() -> None:
    mover = Mover()
    slow, even = ({"a": worker(40, 1), "b": worker(ms)} for ms in (10, 39))
    for now in range(20):
        assert mover.look(slow if now % 2 else even, float(now)) is None


def test_moves_end_when_no_worker_is_clearly_faster_any_more() -> None:
    """One at a time, each after a while: sixteen requests leave one of two equal workers."""
    mover, counts, now, times = Mover(), {"a": 16, "b": 0}, 0.0, list[float]()
    while now < 60:
        move = mover.look({name: worker(20, count, 32) for name, count in counts.items()}, now)
        if move:
            counts[move[0]] -= 1
            counts[move[1]] += 1
            times.append(now)
        now += LOOK_EVERY
    assert slowdown(counts["a"] - 1, 32) <= CLEARLY * slowdown(counts["b"], 32)
    assert counts["a"] > counts["b"] > 0
    assert all(later - earlier >= PATIENCE for earlier, later in pairwise(times))


def test_an_idle_worker_that_nobody_knows_is_tried_now_and_then() -> None:
    workers = {"a": worker(40, 1), "b": worker(50, 1), "new": worker(None)}
    assert looks(workers, 1.5 * TRIAL_PAUSE) == [("b", "new")] * 2
    assert looks({**workers, "new": worker(None, 1)}, 1.5 * TRIAL_PAUSE) == []
    # Long ago it was clearly faster than the slowest is now, or not.
    assert looks({**workers, "new": worker(None, last=0.03)}, TRIAL_PAUSE / 2) == [("b", "new")]
    assert looks({**workers, "new": worker(None, last=0.04)}, TRIAL_PAUSE / 2) == []
    assert looks({**workers, "new": worker(None, avoided=True)}, 1.5 * TRIAL_PAUSE) == []
