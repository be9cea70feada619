"""The heart of a cluster: starts its members, replaces the dead, and says who drafts for whom.

Plain asyncio; what starts processes is passed in. All of it runs in one event loop.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Protocol

from outrider.cluster.cluster_config import ClusterConfig
from outrider.cluster.directory import Directory, DraftWorkerEntry, Place
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
        self._needs = {need.name: need for need in needs_of(config)}
        pools = {pool.name for pool in config.worker_pools}
        self._supervisor = Supervisor(
            (name, Role.DRAFT if name.rpartition("-")[0] in pools else Role.TARGET) for name in self._needs
        )
        self._directory = Directory()
        self._targets: dict[str, Target] = {}
        self._places: dict[str, list[Place]] = {}
        self._changed = asyncio.Condition()
        self._wake = asyncio.Event()
        self._stopping = False

    async def run(self) -> None:
        """Starts what is due until ``stop``; waits for events, never in vain."""
        while not self._stopping:
            self._perform(self._supervisor.poll(self._clock()))
            due = self._supervisor.next_due
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
        return [each for each in self._supervisor.members.values() if each.phase is not Phase.READY]

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
            self._targets.pop(name, None)
            self._places.pop(name, None)
            if self._directory.remove(name, epoch):
                self._publish()
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

    def serving(self, target: Target) -> None:
        self._controller.serving(self._name, self._epoch, target)

    def ended(self, reason: str, *, lasting: bool = False) -> None:
        self._controller.ended(self._name, self._epoch, reason, lasting=lasting)


def is_lasting(error: BaseException) -> bool:
    """Whether a start that failed so would fail again: the settings or the model are at fault."""
    return isinstance(error, OutriderError) and not isinstance(error, WorkerError)
