"""Keeps the processes of a cluster alive: plain Python, told what happens and what time it is.

A *member* is a target group of one or more ranks, or a draft worker of one. It lives in *epochs*:
each start is one, its ranks begin and end together, and what an older epoch still says is not
heard. So two groups can never believe to be the same one, and a half-dead one is never mended but
replaced whole.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

FIRST_PAUSE = 0.2
LONGEST_PAUSE = 30.0
"""Seconds before a member that ended is started again; doubled each time."""
STABLE_SECONDS = 30.0
"""A member that served so long starts the pauses anew."""


class Role(StrEnum):
    """What a member does."""

    TARGET = "target"
    DRAFT = "draft"


class Phase(StrEnum):
    """Where a member stands.

    waiting: for the pause after an end. placing: for resources. starting: loads its model.
    failed: starting it again would not help. resting: not wanted now. stopped: for good.
    """

    WAITING = "waiting"
    PLACING = "placing"
    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    RESTING = "resting"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Place and start this member; report what comes of it under the epoch."""

    member: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Discard:
    """End whatever is left of this epoch of the member, placement included."""

    member: str
    epoch: int


Action = Launch | Discard


@dataclass(slots=True, kw_only=True)
class MemberState:
    """note: for people, why it is not ready. starts: how often it was launched.

    no_room: since it was launched last, no place was found.
    """

    name: str
    role: Role
    phase: Phase = Phase.WAITING
    epoch: int = 0
    note: str = ""
    no_room: bool = False
    starts: int = 0
    pause: float = FIRST_PAUSE
    due: float = 0.0
    ready_since: float = 0.0
    was_ready: bool = False


class Supervisor:
    """Decides when members are started and given up. All times are seconds of one clock."""

    def __init__(self, members: Iterable[tuple[str, Role]]) -> None:
        self.members = {name: MemberState(name=name, role=role) for name, role in members}
        self._epoch = 0

    def poll(self, now: float) -> list[Action]:
        """Launches that are due."""
        actions: list[Action] = []
        for member in self.members.values():
            if member.phase is Phase.WAITING and member.due <= now:
                self._epoch += 1
                member.epoch, member.phase = self._epoch, Phase.PLACING
                member.starts += 1
                member.no_room = False
                actions.append(Launch(member=member.name, epoch=member.epoch))
        return actions

    @property
    def next_due(self) -> float | None:
        """When ``poll`` will have something to do, if nothing else happens."""
        waiting = [each.due for each in self.members.values() if each.phase is Phase.WAITING]
        return min(waiting, default=None)

    def unplaced(self, name: str, epoch: int, reason: str) -> None:
        """There is no room yet; placing goes on."""
        if member := self._current(name, epoch, Phase.PLACING):
            member.note, member.no_room = reason, True

    def placed(self, name: str, epoch: int) -> None:
        """All its ranks have a place."""
        if member := self._current(name, epoch, Phase.PLACING):
            member.phase, member.note, member.no_room = Phase.STARTING, "", False

    def started(self, name: str, epoch: int, now: float) -> bool:
        """All its ranks serve; False if that epoch is over."""
        member = self._current(name, epoch, Phase.STARTING)
        if member is None:
            return False
        member.phase, member.ready_since, member.was_ready = Phase.READY, now, True
        member.note = ""
        return True

    def ended(self, name: str, epoch: int, now: float, reason: str, *, lasting: bool = False) -> list[Action]:
        """A rank is gone, or could not start: the whole epoch is over.

        lasting: another start would end alike; believed only of a member that never served.
        """
        member = self._current(name, epoch, Phase.PLACING, Phase.STARTING, Phase.READY)
        if member is None:
            return []
        if member.phase is Phase.READY and now - member.ready_since >= STABLE_SECONDS:
            member.pause = FIRST_PAUSE
        member.note = reason
        if lasting and not member.was_ready:
            member.phase = Phase.FAILED
        else:
            member.phase, member.due = Phase.WAITING, now + member.pause
            member.pause = min(LONGEST_PAUSE, 2 * member.pause)
        return [Discard(member=name, epoch=epoch)]

    def rest(self, name: str) -> list[Action]:
        """A member is not wanted for now."""
        member = self.members[name]
        running = member.phase in (Phase.PLACING, Phase.STARTING, Phase.READY)
        member.phase, member.note = Phase.RESTING, ""
        return [Discard(member=name, epoch=member.epoch)] if running else []

    def wake(self, name: str, now: float) -> None:
        """A resting member is wanted."""
        member = self.members[name]
        assert member.phase is Phase.RESTING, f"{name} is {member.phase}"
        member.phase, member.due = Phase.WAITING, now

    def stop(self) -> list[Action]:
        """Ends everything for good."""
        actions: list[Action] = []
        for member in self.members.values():
            if member.phase in (Phase.PLACING, Phase.STARTING, Phase.READY):
                actions.append(Discard(member=member.name, epoch=member.epoch))
            member.phase = Phase.STOPPED
        return actions

    def _current(self, name: str, epoch: int, *phases: Phase) -> MemberState | None:
        """The member, unless that epoch is over or it stands elsewhere."""
        member = self.members.get(name)
        return member if member and member.epoch == epoch and member.phase in phases else None
