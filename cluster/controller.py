"""The heart of a cluster: starts its members, replaces the dead, and says who drafts for whom.

Plain asyncio; what starts processes is passed in. All of it runs in one event loop.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Protocol

from outrider.cluster.cluster_config import ClusterConfig
from outrider.cluster.directory import Directory, DraftWorkerEntry, Place
from outrider.cluster.draft_scaling import DraftScaling
from outrider.cluster.placement import Need, needs_of
from outrider.cluster.supervisor import Action, Discard, MemberState, Phase, Role, Supervisor
from outrider.speculation.errors import OutriderError, WorkerError

log = logging.getLogger(__name__)


class Target(Protocol):
    """A target that serves."""

    @property
    def handle(self) -> Any:
        """What callers reach it by."""
        ...

    def draft_with(self, addresses: list[str]) -> None:
        """From now on these draft workers help it; does not wait."""
        ...


class Reports(Protocol):
    """Hears what becomes of one launch; see ``Supervisor``."""

    def unplaced(self, reason: str) -> None: ...

    def placed(self, places: list[Place]) -> None: ...

    def drafting(self, address: str, model: str) -> None:
        """The draft worker listens."""
        ...

    def sessions(self, count: int) -> None:
        """The draft worker drafts for so many requests."""
        ...

    def serving(self, target: Target) -> None:
        """The target serves."""
        ...

    def ended(self, reason: str, *, lasting: bool = False) -> None: ...


class Launcher(Protocol):
    """Starts members somewhere."""

    def launch(self, need: Need, role: Role, epoch: int, addresses: list[str], reports: Reports) -> None:
        """Begins to place and start a member, and tells ``reports`` what becomes of it, from this
        event loop. addresses: of the draft workers, for a target."""
        ...

    def discard(self, name: str, epoch: int) -> None:
        """Ends a member, however far it came, and gives back its place."""
        ...

    async def close(self) -> None:
        """Waits until everything that was discarded is gone."""
        ...


class Controller:
    """One cluster. ``run`` does the work until ``stop``."""

    def __init__(self, config: ClusterConfig, launcher: Launcher, clock: Callable[[], float]) -> None:
        self._config, self._launcher, self._clock = config, launcher, clock
        self._needs = {need.name: need for need in needs_of(config, at_most=True)}
        self._scaling = {
            pool.name: DraftScaling(pool.replicas, pool.most_replicas, pool.max_sessions)
            for pool in config.worker_pools
        }
        self._supervisor = Supervisor(
            (name, Role.DRAFT if _pool_of(name) in self._scaling else Role.TARGET) for name in self._needs
        )
        for name in set(self._needs) - {need.name for need in needs_of(config)}:
            self._supervisor.rest(name)
        self._directory = Directory()
        self._targets: dict[str, Target] = {}
        self._places: dict[str, list[Place]] = {}
        self._changed = asyncio.Condition()
        self._wake = asyncio.Event()
        self._stopping = False

    async def run(self) -> None:
        """Starts what is due until ``stop``; waits for events, never in vain."""
        while not self._stopping:
            now = self._clock()
            self._scale(now)
            self._perform(self._supervisor.poll(now))
            due = min((each for each in self._dues if each is not None), default=None)
            self._wake.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), None if due is None else due - self._clock())
        self._perform(self._supervisor.stop())
        await self._launcher.close()
        await self._tell()

    def stop(self) -> None:
        """Makes ``run`` end everything and return."""
        self._stopping = True
        self._wake.set()

    async def wait_ready(self, seconds: float) -> None:
        """Until every member serves.

        Raises:
            WorkerError: one finds no place, cannot start, or is not ready within ``seconds``.
        """
        try:
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: self._hopeless or not self._unready)
        except TimeoutError:
            late = ", ".join(
                f"{each.name} is {each.phase}" + (f" ({each.note})" if each.note else "")
                for each in self._unready
            )
            raise WorkerError(f"the cluster is not ready after {seconds:g} s: {late}") from None
        if self._hopeless:
            raise WorkerError("; ".join(self._hopeless))

    def targets(self) -> dict[str, Any]:
        """Handles of the targets that serve, by name."""
        return {name: target.handle for name, target in self._targets.items()}

    async def targets_beside(self, known: Mapping[str, int]) -> dict[str, tuple[int, Any]]:
        """Epochs and handles of the targets that serve, by name, once these are not the ``known`` epochs."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._serving_epochs() != dict(known))
        epochs = self._serving_epochs()
        return {name: (epochs[name], target.handle) for name, target in self._targets.items()}

    def _serving_epochs(self) -> dict[str, int]:
        return {name: self._supervisor.members[name].epoch for name in self._targets}

    def status(self) -> list[dict[str, Any]]:
        """A row per member: name, role, phase, epoch, starts, note, places, address and model."""
        rows = []
        for member in self._supervisor.members.values():
            entry = self._directory.get(member.name)
            rows.append(
                {
                    "name": member.name,
                    "role": str(member.role),
                    "phase": str(member.phase),
                    "epoch": member.epoch,
                    "starts": member.starts,
                    "note": member.note,
                    "places": [asdict(place) for place in self._places.get(member.name, [])],
                    "address": "" if entry is None else entry.address,
                }
            )
        return rows

    @property
    def _unready(self) -> list[MemberState]:
        settled = (Phase.READY, Phase.RESTING)
        return [each for each in self._supervisor.members.values() if each.phase not in settled]

    @property
    def _hopeless(self) -> list[str]:
        """Why members will not serve soon: no room, or settings that do not work."""
        stuck = [
            each
            for each in self._unready
            # An older start's last words are no reason to give this one up.
            if each.phase is Phase.FAILED or (each.phase is Phase.PLACING and each.no_room)
        ]
        return [f"{each.name}: {each.note}" for each in stuck]

    @property
    def _dues(self) -> list[float | None]:
        return [self._supervisor.next_due, *(scaling.next_due for scaling in self._scaling.values())]

    def _scale(self, now: float) -> None:
        """Wakes draft workers that are wanted, and lets those rest that are not, the least busy first."""
        for pool, scaling in self._scaling.items():
            scaling.poll(now)
            members = [name for name in self._needs if _pool_of(name) == pool]
            resting = [name for name in members if self._supervisor.members[name].phase is Phase.RESTING]
            for name in resting[: max(0, scaling.wanted - (len(members) - len(resting)))]:
                log.info("%s: wanted, %d requests are drafted for", name, sum(scaling.sessions.values()))
                self._supervisor.wake(name, now)
            working = [name for name in members if name not in resting]
            working.sort(key=lambda name: (-scaling.sessions.get(name, 0), members.index(name)))
            for name in working[scaling.wanted :]:
                log.info("%s: not wanted any more", name)
                self._dismiss(name)

    def _dismiss(self, name: str) -> None:
        epoch = self._supervisor.members[name].epoch
        actions = self._supervisor.rest(name)
        self._forget(name, epoch)
        self._perform(actions)

    def _forget(self, name: str, epoch: int) -> None:
        """A member is gone, or as good as gone."""
        self._targets.pop(name, None)
        self._places.pop(name, None)
        if (scaling := self._scaling.get(_pool_of(name))) is not None:
            scaling.forget(name)
        if self._directory.remove(name, epoch):
            self._publish()

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Discard):
                log.info("%s epoch %d: discarded", action.member, action.epoch)
                self._launcher.discard(action.member, action.epoch)
                continue
            need, role = self._needs[action.member], self._supervisor.members[action.member].role
            log.info("%s epoch %d: started", action.member, action.epoch)
            reports = _Reports(self, action.member, action.epoch)
            self._launcher.launch(need, role, action.epoch, self._directory.addresses, reports)

    def unplaced(self, name: str, epoch: int, reason: str) -> None:
        """See ``Reports``."""
        log.info("%s epoch %d: %s", name, epoch, reason)
        self._supervisor.unplaced(name, epoch, reason)
        self._note_change()

    def placed(self, name: str, epoch: int, places: list[Place]) -> None:
        """See ``Reports``."""
        log.info(
            "%s epoch %d: placed at %s",
            name,
            epoch,
            ", ".join(f"{each.node} as {each.pid}" for each in places),
        )
        self._supervisor.placed(name, epoch)
        self._places[name] = places
        self._note_change()

    def drafting(self, name: str, epoch: int, address: str, model: str) -> None:
        """See ``Reports``."""
        if self._supervisor.started(name, epoch, self._clock()):
            (place,) = self._places[name]
            entry = DraftWorkerEntry(name=name, epoch=epoch, address=address, model=model, place=place)
            log.info("%s epoch %d: drafts with %s at %s", name, epoch, model, address)
            self._directory.register(entry)
            self._publish()
        self._note_change()

    def sessions(self, name: str, epoch: int, count: int) -> None:
        """See ``Reports``."""
        member = self._supervisor.members[name]
        if member.epoch == epoch and member.phase is Phase.READY:
            self._scaling[_pool_of(name)].observe(name, count, self._clock())
            self._wake.set()

    def serving(self, name: str, epoch: int, target: Target) -> None:
        """See ``Reports``."""
        if self._supervisor.started(name, epoch, self._clock()):
            log.info("%s epoch %d: serves", name, epoch)
            self._targets[name] = target
            # Drafters may have come and gone while it loaded.
            target.draft_with(self._directory.addresses)
        self._note_change()

    def ended(self, name: str, epoch: int, reason: str, *, lasting: bool) -> None:
        """See ``Reports``."""
        log.warning("%s epoch %d: %s", name, epoch, reason)
        actions = self._supervisor.ended(name, epoch, self._clock(), reason, lasting=lasting)
        if actions:
            self._forget(name, epoch)
            self._perform(actions)
        self._note_change()

    def _publish(self) -> None:
        for target in self._targets.values():
            target.draft_with(self._directory.addresses)

    def _note_change(self) -> None:
        self._wake.set()
        self._telling = asyncio.ensure_future(self._tell())

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class _Reports:
    """Says which member and epoch a launch's reports are about."""

    def __init__(self, controller: Controller, name: str, epoch: int) -> None:
        self._controller, self._name, self._epoch = controller, name, epoch

    def unplaced(self, reason: str) -> None:
        self._controller.unplaced(self._name, self._epoch, reason)

    def placed(self, places: list[Place]) -> None:
        self._controller.placed(self._name, self._epoch, places)

    def drafting(self, address: str, model: str) -> None:
        self._controller.drafting(self._name, self._epoch, address, model)

    def sessions(self, count: int) -> None:
        self._controller.sessions(self._name, self._epoch, count)

    def serving(self, target: Target) -> None:
        self._controller.serving(self._name, self._epoch, target)

    def ended(self, reason: str, *, lasting: bool = False) -> None:
        self._controller.ended(self._name, self._epoch, reason, lasting=lasting)


def _pool_of(name: str) -> str:
    return name.rpartition("-")[0]


def is_lasting(error: BaseException) -> bool:
    """Whether a start that failed so would fail again: the settings or the model are at fault."""
    return isinstance(error, OutriderError) and not isinstance(error, WorkerError)
