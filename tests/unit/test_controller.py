"""A cluster's controller over launches that only pretend: who is started, told and given up."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pytest

from outrider.cluster.cluster_config import parse_config
from outrider.cluster.controller import Controller, Reports, is_lasting
from outrider.cluster.directory import Place
from outrider.cluster.draft_scaling import QUIET_SECONDS
from outrider.cluster.placement import Need
from outrider.cluster.supervisor import FIRST_PAUSE, Role
from outrider.speculation.errors import InvalidConfigError, ModelNotFoundError, WorkerError

ONE_OF_EACH: dict[str, Any] = {"draft": {}}
TWO_OF_EACH: dict[str, Any] = {"target": {"replicas": 2}, "draft": {"replicas": 2}}
PLACE = Place(node="10.0.0.1", pid=7)


@dataclass
class FakeTarget:
    """Notes who is to draft for it."""

    handle: str
    told: list[list[str]] = field(default_factory=list)

    def draft_with(self, addresses: list[str]) -> None:
        self.told.append(addresses)


@dataclass
class Launched:
    """One launch, for a test to say what becomes of it."""

    need: Need
    role: Role
    epoch: int
    addresses: list[str]
    reports: Reports

    def serve(self) -> FakeTarget:
        target = FakeTarget(f"{self.need.name}@{self.epoch}")
        self.reports.placed([PLACE])
        self.reports.serving(target)
        return target

    def draft(self) -> str:
        address = f"{self.need.name}:{self.epoch}"
        self.reports.placed([PLACE])
        self.reports.drafting(address, "tiny")
        return address


class FakeLauncher:
    """A ``Launcher`` that starts nothing."""

    def __init__(self) -> None:
        self.launches: list[Launched] = []
        self.discarded: list[tuple[str, int]] = []
        self.closed = 0

    def launch(self, need: Need, role: Role, epoch: int, addresses: list[str], reports: Reports) -> None:
        self.launches.append(Launched(need, role, epoch, addresses, reports))

    def discard(self, name: str, epoch: int) -> None:
        assert not self.closed
        self.discarded.append((name, epoch))

    async def close(self) -> None:
        self.closed += 1


class Stage:
    """A controller that runs, and the time that it believes in."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.now = 100.0
        self.launcher = FakeLauncher()
        self.controller = Controller(parse_config(config, "x"), self.launcher, lambda: self.now)

    def launched(self, name: str) -> Launched:
        """The latest launch of a member."""
        return [each for each in self.launcher.launches if each.need.name == name][-1]

    def row(self, name: str) -> dict[str, Any]:
        """The member's status."""
        (row,) = [each for each in self.controller.status() if each["name"] == name]
        return row

    def bring_up(self) -> dict[str, FakeTarget]:
        """Everything serves."""
        targets = {}
        for each in self.launcher.launches:
            if each.role is Role.TARGET:
                targets[each.need.name] = each.serve()
            else:
                each.draft()
        return targets

    async def pass_time(self, seconds: float = 0.0) -> None:
        """Lets the controller do what is due by then; takes no time."""
        self.now += seconds
        for _ in range(20):
            await asyncio.sleep(0)

    async def refusal(self, seconds: float = 1000.0) -> str:
        """What waiting for the cluster ends with."""
        with pytest.raises(WorkerError) as caught:
            await self.controller.wait_ready(seconds)
        return str(caught.value)


Scenario: TypeAlias = Callable[[Stage], Coroutine[Any, Any, None]]


def play(config: dict[str, Any], scenario: Scenario) -> None:
    """Runs a scenario from the moment when everything was launched."""

    async def act() -> None:
        stage = Stage(config)
        running = asyncio.ensure_future(stage.controller.run())
        await stage.pass_time()
        await scenario(stage)
        assert not running.done() or running.exception() is None
        stage.controller.stop()
        await asyncio.wait_for(running, 5)
        assert stage.launcher.closed == 1

    asyncio.run(act())


def test_everything_is_launched_at_once_and_ready_when_all_of_it_serves() -> None:
    async def scenario(stage: Stage) -> None:
        launches = stage.launcher.launches
        roles = {each.need.name: each.role for each in launches}
        assert roles == {
            "target-0": Role.TARGET,
            "target-1": Role.TARGET,
            "draft-0": Role.DRAFT,
            "draft-1": Role.DRAFT,
        }
        assert [each.epoch for each in launches] == [1, 2, 3, 4]
        assert all(each.addresses == [] for each in launches)
        waiting = asyncio.ensure_future(stage.controller.wait_ready(1000))
        for each in launches[1:]:
            each.serve() if each.role is Role.TARGET else each.draft()
            await stage.pass_time()
            assert not waiting.done()
        launches[0].serve()
        await asyncio.wait_for(waiting, 5)
        assert stage.controller.targets() == {"target-0": "target-0@1", "target-1": "target-1@2"}
        assert {each["phase"] for each in stage.controller.status()} == {"ready"}
        assert stage.row("draft-1") == {
            "name": "draft-1",
            "role": "draft",
            "phase": "ready",
            "epoch": 4,
            "starts": 1,
            "note": "",
            "places": [{"node": "10.0.0.1", "pid": 7}],
            "address": "draft-1:4",
        }

    play(TWO_OF_EACH, scenario)


def test_targets_are_told_of_draft_workers_that_come_go_and_come_back() -> None:
    async def scenario(stage: Stage) -> None:
        targets = [stage.launched(name).serve() for name in ("target-0", "target-1")]
        stage.launched("draft-1").draft()
        stage.launched("draft-0").draft()
        stage.launched("draft-0").reports.ended("killed")
        row = stage.row("draft-0")
        assert (row["phase"], row["note"], row["address"], row["places"]) == ("waiting", "killed", "", [])
        await stage.pass_time(FIRST_PAUSE)
        assert stage.launched("draft-0").epoch == 5
        stage.launched("draft-0").draft()
        for target in targets:
            assert target.told == [
                [],
                ["draft-1:4"],
                ["draft-0:3", "draft-1:4"],
                ["draft-1:4"],
                ["draft-0:5", "draft-1:4"],
            ]
        assert stage.launcher.discarded == [("draft-0", 3)]

    play(TWO_OF_EACH, scenario)


def test_a_target_that_starts_late_hears_of_what_changed_while_it_loaded() -> None:
    async def scenario(stage: Stage) -> None:
        address = stage.launched("draft-0").draft()
        assert stage.launched("target-0").serve().told == [[address]]
        stage.launched("target-0").reports.ended("killed")
        await stage.pass_time(1)
        assert stage.launched("target-0").addresses == [address]
        stage.launched("draft-0").reports.ended("killed")
        assert stage.launched("target-0").serve().told == [[]]

    play(ONE_OF_EACH, scenario)


def test_a_dead_target_is_handed_to_nobody_and_launched_anew() -> None:
    async def scenario(stage: Stage) -> None:
        old = stage.bring_up()["target-0"]
        told = list(old.told)
        stage.launched("target-0").reports.ended("killed")
        assert stage.controller.targets() == {"target-1": "target-1@2"}
        assert stage.launcher.discarded == [("target-0", 1)]
        await stage.pass_time(FIRST_PAUSE)
        assert stage.launched("target-0").epoch == 5
        assert stage.controller.targets() == {"target-1": "target-1@2"}
        stage.launched("target-0").serve()
        assert stage.controller.targets()["target-0"] == "target-0@5"
        assert stage.row("target-0")["starts"] == 2
        assert old.told == told
        await stage.controller.wait_ready(5)

    play(TWO_OF_EACH, scenario)


def test_what_an_old_epoch_says_changes_nothing() -> None:
    async def scenario(stage: Stage) -> None:
        stage.bring_up()
        old_target, old_draft = stage.launched("target-0"), stage.launched("draft-0")
        for each in (old_target, old_draft):
            each.reports.ended("killed")
        await stage.pass_time(1)
        target = stage.launched("target-0").serve()
        stage.launched("draft-0").draft()
        rows, told, targets = stage.controller.status(), list(target.told), stage.controller.targets()
        discarded = list(stage.launcher.discarded)
        for each in (old_target, old_draft):
            each.reports.unplaced("no room")
            each.reports.ended("killed again")
            each.reports.ended("no such model", lasting=True)
        old_target.serve()
        old_draft.draft()
        await stage.pass_time(100)
        assert (target.told, stage.controller.targets()) == (told, targets)
        assert stage.controller.status() == rows
        assert stage.launcher.discarded == discarded
        assert len(stage.launcher.launches) == 4

    play(ONE_OF_EACH, scenario)


def test_missing_room_ends_the_wait_but_not_the_search() -> None:
    async def scenario(stage: Stage) -> None:
        waiting = asyncio.ensure_future(stage.refusal())
        stage.launched("draft-0").draft()
        stage.launched("target-0").reports.unplaced("waits for 4 GPU on one node")
        assert await asyncio.wait_for(waiting, 5) == "target-0: waits for 4 GPU on one node"
        # It is told at once to whoever asks later.
        assert await stage.refusal() == "target-0: waits for 4 GPU on one node"
        assert stage.launcher.discarded == []
        stage.launched("target-0").serve()
        await stage.controller.wait_ready(5)

    play(ONE_OF_EACH, scenario)


def test_settings_that_cannot_work_end_the_wait_and_are_not_tried_again() -> None:
    async def scenario(stage: Stage) -> None:
        stage.launched("target-0").serve()
        stage.launched("draft-0").reports.placed([PLACE])
        stage.launched("draft-0").reports.ended("there is no model folder 'x'", lasting=True)
        assert await stage.refusal() == "draft-0: there is no model folder 'x'"
        await stage.pass_time(1000)
        assert len(stage.launcher.launches) == 2
        assert stage.row("draft-0")["phase"] == "failed"

    play(ONE_OF_EACH, scenario)


def test_every_member_that_cannot_start_is_named() -> None:
    async def scenario(stage: Stage) -> None:
        stage.launched("target-0").reports.unplaced("no room")
        stage.launched("draft-0").reports.ended("no such model", lasting=True)
        assert await stage.refusal() == "target-0: no room; draft-0: no such model"

    play(ONE_OF_EACH, scenario)


def test_a_cluster_that_takes_too_long_says_who_is_late() -> None:
    async def scenario(stage: Stage) -> None:
        stage.launched("draft-0").reports.placed([PLACE])
        line = "the cluster is not ready after 0.01 s: target-0 is placing, draft-0 is starting"
        assert await stage.refusal(0.01) == line
        stage.launched("draft-0").reports.drafting("h:1", "tiny")
        assert await stage.refusal(0.01) == "the cluster is not ready after 0.01 s: target-0 is placing"

    play(ONE_OF_EACH, scenario)


def test_a_start_that_failed_once_is_waited_for() -> None:
    async def scenario(stage: Stage) -> None:
        waiting = asyncio.ensure_future(stage.controller.wait_ready(1000))
        stage.launched("draft-0").reports.placed([PLACE])
        stage.launched("draft-0").reports.ended("its process died")
        await stage.pass_time(1)
        stage.launched("target-0").serve()  # whoever waits looks again, while the other one is placed
        await stage.pass_time()
        assert not waiting.done()
        late = await stage.refusal(0.01)
        assert late == "the cluster is not ready after 0.01 s: draft-0 is placing (its process died)"
        stage.launched("draft-0").draft()
        await asyncio.wait_for(waiting, 5)

    play(ONE_OF_EACH, scenario)


@pytest.mark.parametrize("dead", [False, True])
def test_stopping_discards_what_was_launched_and_waits_for_its_end(dead: bool) -> None:
    async def act() -> None:
        stage = Stage(ONE_OF_EACH)
        gone = asyncio.Event()

        async def close() -> None:
            await gone.wait()

        stage.launcher.close = close  # type: ignore[method-assign]
        running = asyncio.ensure_future(stage.controller.run())
        await stage.pass_time()
        stage.bring_up()
        if dead:
            stage.launched("draft-0").reports.ended("killed")
        stage.controller.stop()
        await stage.pass_time(1000)
        assert sorted(stage.launcher.discarded) == [("draft-0", 2), ("target-0", 1)]
        assert not running.done()
        gone.set()
        await asyncio.wait_for(running, 5)
        assert {each["phase"] for each in stage.controller.status()} == {"stopped"}
        # The last words of what was discarded start nothing.
        stage.launched("target-0").reports.ended("killed")
        await stage.pass_time(1000)
        assert len(stage.launcher.launches) == 2

    asyncio.run(act())


def test_stopping_before_anything_started() -> None:
    async def act() -> None:
        stage = Stage(ONE_OF_EACH)
        stage.controller.stop()
        await asyncio.wait_for(stage.controller.run(), 5)
        assert (stage.launcher.launches, stage.launcher.closed) == ([], 1)

    asyncio.run(act())


def test_nobody_is_woken_in_vain() -> None:
    async def act() -> None:
        stage = Stage(ONE_OF_EACH)
        looks = 0

        def clock() -> float:
            nonlocal looks
            looks += 1
            return 0.0

        controller = Controller(parse_config(ONE_OF_EACH, "x"), stage.launcher, clock)
        running = asyncio.ensure_future(controller.run())
        await asyncio.sleep(0.02)
        assert looks == 1
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    asyncio.run(act())


def test_what_would_fail_again() -> None:
    assert is_lasting(ModelNotFoundError("x"))
    assert is_lasting(InvalidConfigError("x"))
    assert not is_lasting(WorkerError("x"))
    assert not is_lasting(RuntimeError("x"))


def test_draft_workers_come_and_go_with_what_there_is_to_draft() -> None:
    async def scenario(stage: Stage) -> None:
        targets = stage.bring_up()
        assert [each.need.name for each in stage.launcher.launches] == ["target-0", "draft-0"]
        await stage.controller.wait_ready(1.0)
        assert stage.row("draft-1")["phase"] == "resting"
        stage.launched("draft-0").reports.sessions(4)
        await stage.pass_time()
        second = stage.launched("draft-1").draft()
        assert targets["target-0"].told[-1] == ["draft-0:2", second]
        stage.launched("draft-1").reports.sessions(1)
        stage.launched("draft-0").reports.sessions(0)
        await stage.pass_time()
        assert stage.launcher.discarded == []
        await stage.pass_time(QUIET_SECONDS)
        stage.controller._wake.set()
        await stage.pass_time()
        # The busier one stays.
        assert stage.launcher.discarded == [("draft-0", 2)]
        assert targets["target-0"].told[-1] == [second]
        assert stage.row("draft-0")["phase"] == "resting"
        # What the one that rests still says is not heard.
        stage.launched("draft-0").reports.sessions(9)
        stage.launched("draft-0").reports.ended("killed")
        await stage.pass_time()
        assert stage.row("draft-0")["phase"] == "resting"

    play({"draft": {"max_replicas": 2, "max_sessions": 4}}, scenario)
