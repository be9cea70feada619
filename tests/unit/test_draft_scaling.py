"""Draft workers come with the requests that they draft for, and go some time after."""

from hypothesis import given
from hypothesis import strategies as st

from outrider.cluster.draft_scaling import QUIET_SECONDS, DraftScaling


def test_more_come_at_once_as_long_as_there_may_be() -> None:
    scaling = DraftScaling(1, 3, 10)
    wanted = []
    for sessions in (0, 8, 9, 16, 17, 40):
        scaling.observe("draft-0", sessions, 100.0)
        wanted.append(scaling.wanted)
    assert wanted == [1, 1, 2, 2, 3, 3]


def test_a_full_pool_always_grows() -> None:
    """Requests that found no room show up nowhere."""
    scaling = DraftScaling(1, 100, 5)
    for step in range(1, 6):
        for worker in range(scaling.wanted):
            scaling.observe(f"draft-{worker}", 5, float(step))
        assert scaling.wanted > step


def test_one_goes_after_each_quiet_while() -> None:
    scaling = DraftScaling(1, 4, 10)
    scaling.observe("draft-0", 30, 0.0)
    assert scaling.wanted == 4
    scaling.observe("draft-0", 0, 10.0)
    assert (scaling.wanted, scaling.next_due) == (4, 10.0 + QUIET_SECONDS)
    scaling.poll(10.0 + QUIET_SECONDS)
    assert (scaling.wanted, scaling.next_due) == (3, 10.0 + 2 * QUIET_SECONDS)


def test_a_busy_moment_begins_the_quiet_while_anew() -> None:
    scaling = DraftScaling(1, 2, 10)
    scaling.observe("draft-0", 9, 0.0)
    scaling.observe("draft-0", 0, 1.0)
    scaling.observe("draft-0", 9, QUIET_SECONDS)
    scaling.observe("draft-0", 0, QUIET_SECONDS + 1)
    scaling.poll(QUIET_SECONDS + 2)
    assert scaling.wanted == 2


def test_what_is_gone_counts_no_more() -> None:
    scaling = DraftScaling(1, 2, 10)
    scaling.observe("draft-0", 9, 0.0)
    scaling.forget("draft-0")
    scaling.poll(1.0)
    scaling.poll(1.0 + QUIET_SECONDS)
    assert scaling.wanted == 1


@given(st.lists(st.tuples(st.integers(0, 200), st.floats(0, 100))))
def test_there_are_never_too_few_nor_too_many(history: list[tuple[int, float]]) -> None:
    scaling, now = DraftScaling(2, 5, 10), 0.0
    for sessions, seconds in history:
        now += seconds
        before = scaling.wanted
        scaling.observe("draft-0", sessions, now)
        assert 2 <= scaling.wanted <= 5
        assert scaling.wanted >= min(5, sessions / 8)
        assert scaling.wanted >= before - 1
