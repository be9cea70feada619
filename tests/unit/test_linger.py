"""Holding a step back for growth: when growth is expected, whether it is worth it, and how eager to be."""

import math

import numpy as np
import pytest

from outrider.speculation.pipelines.actions import Linger
from outrider.speculation.pipelines.linger import KAPPAS, NEVER, LingerRule
from outrider.speculation.pipelines.patience import MAX_PATIENCE
from outrider.speculation.replication.messages import Growth
from outrider.speculation.replication.pace import STEPS, GrowthTimes, LinkPace

STEP, TRIP = 0.01, 0.004
OFFSET = 100.0
"""The target's clock minus the drafter's."""


def growth(first_id: int, *, sent_at: float, seen: int = 0, final: bool = False, nodes: int = 2) -> Growth:
    return Growth(
        session=1, generation=1, seen_commit=seen, base_length=1, first_id=first_id,
        parents=np.zeros(nodes, np.int64), tokens=np.arange(nodes), scores=np.ones(nodes, np.float32),
        final=final, draft_steps=int(nodes > 0), sent_at=sent_at - OFFSET,
    )  # fmt: skip


def stream() -> GrowthTimes:
    """Two commits were answered, one of them by two draft steps."""
    times = GrowthTimes(LinkPace(), 0.0)
    times.committed(1, 1.0)
    times.arrived([growth(1, sent_at=0.995), growth(3, sent_at=1.0 + TRIP, seen=1)], OFFSET)
    times.arrived([growth(5, sent_at=1.0 + TRIP + STEP, seen=1)], OFFSET)
    return times


def offer(*, due: float, gain: float, every: float = STEP, until: float = 9.0) -> Linger:
    return Linger(budget=0, due=due, until=until, every=every, gains=gain * np.arange(1, 5) ** 0.5)


def rule(kappa: float, batch: int = 1) -> LingerRule:
    """Of a batch that gets 10 tokens a second."""
    made = LingerRule((kappa,), kappa)
    made.observe(batch, promised=0.0, accepted=0, seconds=batch / 10)
    return made


def test_pace_is_measured_on_the_target_s_clock() -> None:
    pace = stream().pace
    assert pace.answer == pytest.approx(TRIP)
    assert pace.interval == pytest.approx(STEP)


def test_that_there_is_nothing_to_draft_is_no_answer() -> None:
    times = stream()
    for sequence in range(2, 40):
        times.committed(sequence, float(sequence))
        times.arrived([growth(5, nodes=0, sent_at=sequence + 0.001, seen=sequence, final=True)], OFFSET)
    assert times.pace.answer == pytest.approx(TRIP)


def test_pace_tells_what_a_drafter_would_do_for_one_request_alone() -> None:
    assert LinkPace().alone is None
    for load in (1.0, 2.5):
        pace = LinkPace()
        pace.load = load
        pace.observe_answer(TRIP * load)
        assert pace.alone is None, "one growth does not tell how often more comes"
        pace.observe_interval(STEP * load)
        pace.load = 7.0
        assert pace.alone == pytest.approx(TRIP + (STEPS - 1) * STEP), "the load while it was measured counts"


def test_growth_is_expected_after_an_interval_while_it_streams() -> None:
    times = stream()
    due = 1.0 + TRIP + 2 * STEP
    expected = times.expected(1.015, bare=False)
    assert expected == pytest.approx((due, due + STEP / 2))
    late = times.expected(due + STEP / 4, bare=False)
    assert late == pytest.approx((due + STEP / 4, due + STEP / 2))
    assert times.expected(due + STEP, bare=False) is None, "what is overdue is still counted on"


def test_after_a_miss_growth_is_expected_when_the_commit_is_answered() -> None:
    times = stream()
    times.committed(2, 1.02)
    expected = times.expected(1.02, bare=True)
    assert expected == pytest.approx((1.02 + TRIP, 1.02 + 1.5 * TRIP))
    streaming = times.expected(1.02, bare=False)
    assert streaming is not None
    assert streaming[0] == pytest.approx(1.0 + TRIP + 2 * STEP)


def test_nothing_is_expected_of_a_drafter_that_has_finished_or_is_unknown() -> None:
    times = stream()
    times.arrived([growth(7, sent_at=1.02, seen=1, final=True)], OFFSET)
    assert times.expected(1.021, bare=False) is None
    times.committed(2, 1.03)
    assert times.expected(1.03, bare=False) == pytest.approx((1.03 + TRIP, 1.03 + 1.5 * TRIP))
    assert GrowthTimes(LinkPace(), 0.0).expected(0.0, bare=True) is None


def test_a_message_that_comes_twice_or_late_is_no_measure() -> None:
    times = stream()
    times.arrived([growth(1, sent_at=0.5, seen=1), growth(90, sent_at=7.0, seen=1)], OFFSET)
    assert times.pace.interval == pytest.approx(STEP)


def test_waits_while_gains_exceed_what_the_time_would_bring() -> None:
    assert rule(2.0).hold_until([offer(due=0.01, gain=0.3)], 1, 0.0, 0.0) == MAX_PATIENCE
    assert rule(2.0).hold_until([offer(due=0.01, gain=0.3, until=0.02)], 1, 0.0, 0.0) == 0.02
    assert rule(40.0).hold_until([offer(due=0.01, gain=0.3)], 1, 0.0, 0.0) is None
    assert rule(NEVER).hold_until([offer(due=0.0, gain=9.0)], 1, 0.0, 0.0) is None
    assert rule(2.0).hold_until([], 1, 0.0, 0.0) is None


def test_looks_beyond_the_next_draft_step() -> None:
    """The first growth after a round trip alone is not worth the wait; what follows it at once is."""
    one = Linger(budget=0, due=0.1, until=1.0, every=0.001, gains=np.array([0.9]))
    more = Linger(budget=0, due=0.1, until=1.0, every=0.001, gains=np.array([0.9, 1.7, 2.4]))
    assert rule(1.0).hold_until([one], 1, 0.0, 0.0) is None
    assert rule(1.0).hold_until([more], 1, 0.0, 0.0) is not None


@pytest.mark.parametrize("seed", range(20))
def test_a_batch_waits_if_all_gain_more_together_than_all_lose(seed: int) -> None:
    rng = np.random.default_rng(seed)
    offers = [
        offer(due=float(rng.random() * 0.05), gain=float(rng.random()), every=float(rng.random() * 0.02))
        for _ in range(int(rng.integers(1, 5)))
    ]
    batch, kappa = 6, 0.5 + float(rng.random())
    worth = -math.inf
    for candidate in (each.due + k * each.every for each in offers for k in range(4)):
        gain = 0.0
        for each in offers:
            there = [each.gains[k] for k in range(4) if each.due + k * each.every <= candidate + 1e-12]
            gain += there[-1] if there else 0.0
        worth = max(worth, gain - kappa * 10.0 * candidate)
    waits = rule(kappa, batch).hold_until(offers, batch, 0.0, 0.0) is not None
    assert waits == (worth > 0)


def test_no_step_is_held_back_for_long() -> None:
    drip = rule(0.001)
    assert drip.hold_until([offer(due=5.0, gain=9.0)], 1, 4.9, 5.0) == pytest.approx(4.9 + MAX_PATIENCE)
    assert drip.hold_until([offer(due=5.2, gain=9.0)], 1, 4.9, 4.9 + MAX_PATIENCE) is None


def learnt(rates: dict[float, float], *, steps: int, noise: float = 0.5) -> tuple[LingerRule, list[float]]:
    """A rule after so many steps, if a kappa's steps bring so many tokens a second; all kappas it used."""
    made, rng, used = LingerRule(), np.random.default_rng(0), list[float]()
    for _ in range(steps):
        kappa = made.kappa(1)
        used.append(kappa)
        promised = 2.0 + noise * float(rng.standard_normal())
        accepted = int(rng.random() * 2 * promised)
        made.observe(1, promised=promised, accepted=accepted, seconds=3.0 / rates[kappa])
    return made, used


@pytest.mark.parametrize("best", KAPPAS)
def test_learns_the_kappa_that_brings_most(best: float) -> None:
    distance = {kappa: abs(KAPPAS.index(kappa) - KAPPAS.index(best)) for kappa in KAPPAS}
    rates = {kappa: 1.0 - 0.08 * distance[kappa] for kappa in KAPPAS}
    _, used = learnt(rates, steps=4000)
    late = used[2000:]
    assert sum(kappa == best for kappa in late) > 0.85 * len(late)


def test_trials_of_what_is_no_better_become_rare() -> None:
    _, used = learnt(dict.fromkeys(KAPPAS, 1.0), steps=6000, noise=0.0)
    assert len(set(used)) == 3, "its neighbours are not tried"
    assert sum(kappa != used[0] for kappa in used[4000:]) < 0.06 * 2000


def test_batch_sizes_learn_apart() -> None:
    made, _ = learnt({2.0: 2.0, 4.0: 1.0, 8.0: 0.5, NEVER: 0.25}, steps=600)
    assert made.kappa(1) == 2.0
    assert made.kappa(8) == 4.0
