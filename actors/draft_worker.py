"""A draft worker without its transport: many sessions of many targets, one draft step at a time.

Between two steps it takes in what arrived, so that a commit is heeded within one step. It
holds no truth: whatever it cannot follow it gives up, and the target opens it anew.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from outrider.actors.transport import TargetPeer
from outrider.speculation.errors import OutriderError
from outrider.speculation.growth import Growable, choose_frontiers, is_exhausted
from outrider.speculation.living_tree import LivingTree, Reroot
from outrider.speculation.replication.messages import (
    NO_LIMIT,
    Close,
    Commit,
    GrowthLimits,
    Hello,
    Lost,
    Open,
    TargetMessage,
)
from outrider.speculation.replication.publisher import Publisher
from outrider.speculation.replication.replica import GapError
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.statistics import WorkerStatistics
from outrider.speculation.types import IntArray

log = logging.getLogger(__name__)

MAX_STEP_NODES = 16
"""Nodes that one step expands over all sessions; more make every session's answer late."""
MAX_HELD_STEPS = 4
"""Steps after which growth is sent at the latest. With several sessions each grows by little in a
step, and a message costs the target more than the little is worth."""
IDLE_SECONDS = 60.0
"""A session without a commit for so long has been forgotten by its target."""
MAX_TOMBSTONES = 4096


class GrowingTree(Protocol):
    """One session of a draft engine."""

    tree: LivingTree

    @property
    def root_rows(self) -> int:
        """Rows that expanding the root takes."""
        ...

    def commit(self, tokens: IntArray) -> Reroot:
        """Moves the root down newly committed tokens (int64 ``[count]``)."""
        ...

    def close(self) -> None:
        """Frees what the session holds."""
        ...


AnyTree = TypeVar("AnyTree", bound=GrowingTree)


class BatchDraftEngine(Protocol[AnyTree]):
    """Grows the trees of many sessions in one forward."""

    max_rows: int
    """Rows of the largest forward."""

    def open_session(
        self,
        token_ids: IntArray,
        prompt_length: int,
        params: SamplingParams,
        *,
        choice: int,
        children: int,
        eos_ids: tuple[int, ...],
    ) -> AnyTree:
        """A session behind ``token_ids`` (int64 ``[length]``), which the prompt begins.

        Raises:
            OutriderError: the request does not fit, or there is no room for it.
        """
        ...

    def grow(self, plan: Sequence[tuple[AnyTree, IntArray]]) -> None:
        """Expands these slots of these sessions."""
        ...


@dataclass(slots=True)
class _Session:
    """One generation of one target's request.

    steps_left: until the next commit, or ``NO_LIMIT``. reported: a message with ``final`` is out.
    awaited: nothing has been sent since the last commit.
    draft_steps, draft_rows, draft_seconds: since the last message.
    """

    peer: TargetPeer
    publisher: Publisher
    growing: GrowingTree
    limits: GrowthLimits
    steps_left: int
    last_heard: float
    reported: bool = False
    awaited: bool = True
    draft_steps: int = 0
    draft_rows: int = 0
    draft_seconds: float = 0.0

    @property
    def growable(self) -> Growable:
        return Growable(
            tree=self.growing.tree,
            width=self.limits.width,
            min_score=self.limits.min_score,
            root_rows=self.growing.root_rows,
        )

    def follow(self, commit: Commit, now: float, statistics: WorkerStatistics) -> None:
        self.last_heard = now
        if not self.publisher.accepts(commit):
            statistics.duplicate_commits += 1
            return
        had_tree = len(self.growing.tree) > 0
        survived = self.growing.commit(commit.tokens).survived
        statistics.commits += 1
        statistics.reroot_hits += had_tree and survived
        statistics.reroot_misses += had_tree and not survived
        self.steps_left = commit.steps
        self.reported = False
        self.awaited = True


@dataclass(slots=True)
class _Target:
    """One connected target: its sessions by number, and the numbers that are over."""

    eos_ids: tuple[int, ...]
    sessions: dict[int, _Session] = field(default_factory=dict)
    closed: OrderedDict[int, int] = field(default_factory=OrderedDict)

    def forget(self, session: int, generation: int) -> None:
        """Notes that nothing up to this generation may be opened any more."""
        self.closed[session] = max(generation, self.closed.pop(session, 0))
        if len(self.closed) > MAX_TOMBSTONES:
            self.closed.popitem(last=False)


class DraftWorker:
    """Drafts for every peer that joins; not thread-safe, one owner calls everything."""

    def __init__(
        self,
        engine: BatchDraftEngine[Any],
        *,
        clock: Callable[[], float],
        max_step_nodes: int = MAX_STEP_NODES,
    ) -> None:
        self._engine, self._clock, self._max_step_nodes = engine, clock, max_step_nodes
        self._targets: dict[TargetPeer, _Target] = {}
        self.statistics = WorkerStatistics(began_at=clock())

    def slept(self, seconds: float) -> None:
        """Notes that there was nothing to do for so long."""
        self.statistics.idle_seconds += seconds

    @property
    def num_sessions(self) -> int:
        return sum(len(target.sessions) for target in self._targets.values())

    def joined(self, peer: TargetPeer, hello: Hello) -> None:
        """A target has connected."""
        log.info("a target has connected")
        self._targets[peer] = _Target(hello.eos_ids)

    def left(self, peer: TargetPeer) -> None:
        """A target's stream has ended: all its sessions go."""
        log.info("a target has left")
        target = self._targets.pop(peer, None)
        for session in target.sessions.values() if target else ():
            session.growing.close()

    def message(self, peer: TargetPeer, message: TargetMessage) -> None:
        """Takes in what a target sent."""
        target = self._targets.get(peer)
        if target is None or isinstance(message, Hello):
            return
        if isinstance(message, Open):
            self._open(peer, target, message)
        elif isinstance(message, Commit):
            self._commit(peer, target, message)
        else:
            self._close(target, message)

    def step(self) -> bool:
        """One draft step over the most valuable nodes of all sessions; False: there is none to do."""
        self._expire()
        sessions = [each for each in self._all() if each.steps_left]
        frontiers = choose_frontiers(
            [each.growable for each in sessions],
            max_nodes=self._max_step_nodes,
            max_rows=self._engine.max_rows,
        )
        plan = [(each, slots) for each, slots in zip(sessions, frontiers, strict=True) if len(slots)]
        if plan:
            self._grow(plan)
        self._publish_grown(last=not plan)
        self._report_finished(plan)
        return bool(plan)

    def _grow(self, plan: list[tuple[_Session, IntArray]]) -> None:
        rows = np.array([session.growing.root_rows or len(slots) for session, slots in plan])
        began = self._clock()
        self._engine.grow([(session.growing, slots) for session, slots in plan])
        now = self._clock()
        self.statistics.draft_steps += 1
        self.statistics.draft_rows += int(rows.sum())
        self.statistics.draft_seconds += now - began
        for (session, _), count in zip(plan, rows.tolist(), strict=True):
            session.draft_steps += 1
            session.draft_rows += count
            session.draft_seconds += (now - began) * count / int(rows.sum())
            if session.steps_left != NO_LIMIT:
                session.steps_left -= 1

    def _publish_grown(self, *, last: bool) -> None:
        """Sends what grew, now or some steps later. last: nothing will grow before the next commit."""
        sessions = self._all()
        held = max(1, min(MAX_HELD_STEPS, len(sessions)))
        due = last or self.statistics.draft_steps % held == 0
        for session in sessions:
            if session.draft_steps and (due or session.awaited or not session.steps_left):
                self._publish(session, final=session.steps_left == 0)

    def _report_finished(self, plan: list[tuple[_Session, IntArray]]) -> None:
        """Sessions that have nothing left to grow tell their target not to wait."""
        grown = {id(session) for session, _ in plan}
        for session in self._all():
            if session.reported or id(session) in grown:
                continue
            if not session.steps_left or is_exhausted(session.growable):
                self._publish(session, final=True)

    def _publish(self, session: _Session, *, final: bool) -> None:
        growths = session.publisher.publish(
            final=final,
            draft_steps=session.draft_steps,
            draft_rows=session.draft_rows,
            draft_seconds=session.draft_seconds,
            sent_at=self._clock(),
        )
        session.reported = final
        # A step that yielded nothing, as within a long text, is reported with the next that does.
        if final or len(growths[0].tokens):
            session.awaited = False
            session.draft_steps, session.draft_rows, session.draft_seconds = 0, 0, 0.0
            for growth in growths:
                self.statistics.growth_messages += 1
                self.statistics.growth_nodes += len(growth.tokens)
                session.peer.send(growth)

    def _open(self, peer: TargetPeer, target: _Target, opening: Open) -> None:
        known = target.sessions.get(opening.session)
        newest = known.publisher.generation if known else target.closed.get(opening.session, 0)
        if opening.generation <= newest:
            return
        self._drop(target, opening.session)
        try:
            growing = self._engine.open_session(
                opening.token_ids,
                opening.prompt_length,
                opening.params,
                choice=opening.choice,
                children=opening.limits.children,
                eos_ids=target.eos_ids,
            )
        except OutriderError as error:
            self._lose(peer, target, opening.session, opening.generation, str(error))
            return
        log.info("session %d: drafts behind %d tokens", opening.session, len(opening.token_ids))
        self.statistics.sessions_opened += 1
        target.sessions[opening.session] = _Session(
            peer=peer,
            publisher=Publisher(opening, growing.tree),
            growing=growing,
            limits=opening.limits,
            steps_left=opening.limits.steps,
            last_heard=self._clock(),
        )

    def _commit(self, peer: TargetPeer, target: _Target, commit: Commit) -> None:
        session = target.sessions.get(commit.session)
        closed = target.closed.get(commit.session, 0)
        if commit.generation <= closed or (session and commit.generation < session.publisher.generation):
            return
        if session is None or commit.generation > session.publisher.generation:
            reason = f"generation {commit.generation} of session {commit.session} was never opened"
            self._lose(peer, target, commit.session, commit.generation, reason)
            return
        try:
            session.follow(commit, self._clock(), self.statistics)
        except (GapError, OutriderError) as error:
            self._lose(peer, target, commit.session, commit.generation, str(error))

    def _close(self, target: _Target, close: Close) -> None:
        session = target.sessions.get(close.session)
        if session is None or close.generation >= session.publisher.generation:
            self._drop(target, close.session)
            target.forget(close.session, close.generation)

    def _lose(self, peer: TargetPeer, target: _Target, session: int, generation: int, reason: str) -> None:
        log.warning("session %d: lost: %s", session, reason)
        self._drop(target, session)
        self.statistics.sessions_lost += 1
        peer.send(Lost(session=session, generation=generation, reason=reason))

    def _drop(self, target: _Target, number: int) -> None:
        session = target.sessions.pop(number, None)
        if session is not None:
            session.growing.close()

    def _expire(self) -> None:
        now = self._clock()
        for target in self._targets.values():
            for number, session in list(target.sessions.items()):
                if now - session.last_heard > IDLE_SECONDS:
                    self._drop(target, number)

    def _all(self) -> list[_Session]:
        return [session for target in self._targets.values() for session in target.sessions.values()]
