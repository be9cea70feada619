"""Members are started, given up and replaced whole; old epochs are not heard."""

import pytest

from outrider.cluster.supervisor import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    STABLE_SECONDS,
    Discard,
    Launch,
    Phase,
    Role,
    Supervisor,
)


@pytest.fixture
def supervisor() -> Supervisor:
    return Supervisor([("target-0", Role.TARGET), ("draft-0", Role.DRAFT)])


def bring_up(supervisor: Supervisor, now: float = 0.0) -> int:
    """Starts everything; the target's epoch."""
    epochs = {each.member: each.epoch for each in supervisor.poll(now) if isinstance(each, Launch)}
    for name, epoch in epochs.items():
        supervisor.placed(name, epoch)
        assert supervisor.started(name, epoch, now)
    return epochs["target-0"]


def test_everything_is_launched_once_under_an_epoch_of_its_own(supervisor: Supervisor) -> None:
    launches = supervisor.poll(0.0)
    assert launches == [Launch(member="target-0", epoch=1), Launch(member="draft-0", epoch=2)]
    assert supervisor.poll(100.0) == []
    assert supervisor.next_due is None


def test_a_dead_member_is_discarded_and_launched_anew_after_a_pause(supervisor: Supervisor) -> None:
    epoch = bring_up(supervisor)
    assert supervisor.ended("target-0", epoch, 5.0, "killed") == [Discard(member="target-0", epoch=epoch)]
    assert supervisor.poll(5.0) == []
    assert supervisor.next_due == pytest.approx(5.0 + FIRST_PAUSE)
    assert supervisor.poll(5.0 + FIRST_PAUSE) == [Launch(member="target-0", epoch=3)]
    assert supervisor.members["draft-0"].phase is Phase.READY


def test_what_an_old_epoch_says_is_not_heard(supervisor: Supervisor) -> None:
    old = bring_up(supervisor)
    supervisor.ended("target-0", old, 0.0, "killed")
    (launch,) = supervisor.poll(10.0)
    assert not supervisor.started("target-0", old, 10.0)
    assert supervisor.ended("target-0", old, 10.0, "killed again") == []
    supervisor.placed("target-0", old)
    assert supervisor.members["target-0"].phase is Phase.PLACING
    assert supervisor.members["target-0"].epoch == launch.epoch


def test_a_member_that_keeps_failing_is_tried_ever_more_rarely(supervisor: Supervisor) -> None:
    now, pauses = 0.0, []
    for _ in range(12):
        (launch,) = [each for each in supervisor.poll(now) if each.member == "draft-0"]
        supervisor.ended("draft-0", launch.epoch, now, "no")
        due = supervisor.members["draft-0"].due
        pauses.append(due - now)
        now = due
    assert pauses[0] == pytest.approx(FIRST_PAUSE)
    assert pauses[1] == pytest.approx(2 * FIRST_PAUSE)
    assert pauses[-1] == LONGEST_PAUSE


def test_long_service_forgives_earlier_failures(supervisor: Supervisor) -> None:
    epoch = bring_up(supervisor)
    for _ in range(5):
        supervisor.ended("target-0", epoch, 0.0, "no")
        epoch = next(each.epoch for each in supervisor.poll(1000.0) if each.member == "target-0")
        supervisor.placed("target-0", epoch)
        supervisor.started("target-0", epoch, 1000.0)
    supervisor.ended("target-0", epoch, 1000.0 + STABLE_SECONDS, "no")
    assert supervisor.members["target-0"].due == pytest.approx(1000.0 + STABLE_SECONDS + FIRST_PAUSE)


def test_settings_that_cannot_work_are_not_tried_again(supervisor: Supervisor) -> None:
    launch = supervisor.poll(0.0)[0]
    supervisor.placed("target-0", launch.epoch)
    actions = supervisor.ended("target-0", launch.epoch, 1.0, "no such model", lasting=True)
    assert actions == [Discard(member="target-0", epoch=launch.epoch)]
    assert supervisor.members["target-0"].phase is Phase.FAILED
    assert supervisor.members["target-0"].note == "no such model"
    assert supervisor.poll(1e6) == []


def test_a_member_that_has_served_is_always_tried_again(supervisor: Supervisor) -> None:
    epoch = bring_up(supervisor)
    supervisor.ended("target-0", epoch, 1.0, "no such model", lasting=True)
    assert supervisor.members["target-0"].phase is Phase.WAITING


def test_missing_room_is_noted_and_forgotten_when_found(supervisor: Supervisor) -> None:
    launch = supervisor.poll(0.0)[0]
    supervisor.unplaced("target-0", launch.epoch, "needs 4 GPU")
    assert supervisor.members["target-0"].note == "needs 4 GPU"
    assert supervisor.members["target-0"].phase is Phase.PLACING
    supervisor.placed("target-0", launch.epoch)
    assert supervisor.members["target-0"].note == ""


def test_stopping_discards_what_was_launched_and_starts_nothing_more(supervisor: Supervisor) -> None:
    epoch = bring_up(supervisor)
    supervisor.ended("draft-0", 2, 0.0, "killed")
    assert supervisor.stop() == [Discard(member="target-0", epoch=epoch)]
    assert supervisor.poll(1e6) == []
    assert not supervisor.started("target-0", epoch, 0.0)


def test_strangers_are_not_heard(supervisor: Supervisor) -> None:
    supervisor.poll(0.0)
    supervisor.unplaced("target-9", 1, "x")
    assert supervisor.ended("target-9", 1, 0.0, "x") == []
    assert not supervisor.started("target-9", 1, 0.0)
