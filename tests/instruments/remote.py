"""Targets and draft workers around tables, in virtual time and with every message encoded.

What is simulated is the time that things take and what the network does; engines, pools,
pipelines, workers and the wire format are the real ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np
import torch

from instruments.serving import Letters
from instruments.table_drafts import TableDraftEngine
from instruments.table_lm import TableLM, TableSequence
from outrider.actors.draft_pool import DraftPool
from outrider.actors.draft_worker import DraftWorker
from outrider.actors.request_run import RequestRun
from outrider.actors.runner import TreeQuery
from outrider.actors.target_engine import TargetEngine, TargetModel
from outrider.actors.tracing import Trace
from outrider.actors.transport import Arrivals, DraftChannel
from outrider.actors.virtual import (
    BusyTime,
    Faults,
    VirtualArrivals,
    VirtualClock,
    VirtualLink,
    VirtualWorker,
    faultless,
)
from outrider.speculation.pipelines import registry
from outrider.speculation.pipelines.registry import PIPELINES, growth_limits
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.replication.messages import (
    PROTOCOL_VERSION,
    DrafterMessage,
    Hello,
    TargetMessage,
    Welcome,
)
from outrider.speculation.request import Request, StepOutput
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.statistics import SpeculationStatistics
from outrider.speculation.stopping import TextSource
from outrider.speculation.tree import DraftTree
from outrider.speculation.verifiers.registry import make_verifier

MAX_STALL = 0.25
"""Seconds that drafters may hold a target back in one step."""
FOREVER = 100.0
"""Seconds after which a worker has forgotten whom nobody speaks for."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds: of a target's step with one row, of each further row, of a draft step, one way."""

    target: float = 0.05
    row: float = 0.0005
    draft: float = 0.01
    delay: float = 0.001


class TimedTable(TableLM):
    """A table whose forwards take their time.

    seconds: all that they took. trees: what was verified, in order.
    """

    def __init__(self, table: TableLM, world: VirtualClock, pace: Pace) -> None:
        super().__init__(table.logits)
        self._world, self._pace = world, pace
        self.seconds = 0.0
        self.trees: list[DraftTree] = []

    def verify(self, queries: Sequence[TreeQuery[TableSequence]]) -> list[torch.Tensor]:
        rows = sum(query.num_rows for query in queries)
        took = self._pace.target + self._pace.row * (rows - 1)
        self._world.advance(took)
        self.seconds += took
        self.trees += [query.tree for query in queries if query.tree is not None]
        return super().verify(queries)


@dataclass
class Finished:
    """A request that was run to its end. times: when its steps ended."""

    run: RequestRun
    steps: list[StepOutput] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [token for step in self.steps for token in step.token_ids]

    @property
    def streamed(self) -> str:
        return "".join(step.text for step in self.steps)

    @property
    def stats(self) -> SpeculationStatistics:
        return self.run.stats

    @property
    def answer(self) -> tuple[object, ...]:
        """All that a user sees; see ``serving.Outcome``."""
        last = self.steps[-1]
        return self.token_ids, self.run.text, self.streamed, last.finish_reason, last.stop_reason

    def accepted_after(self, time: float) -> int:
        return sum(step.num_accepted for step, at in zip(self.steps, self.times, strict=True) if at > time)


class Target:
    """One target engine with its draft workers. stalls: seconds of each step beside its forward."""

    def __init__(
        self,
        world: VirtualClock,
        lm: TimedTable,
        channels: Sequence[DraftChannel],
        arrivals: Arrivals,
        *,
        pipeline: str,
        shape: TreeShape,
        eos_ids: tuple[int, ...] = (),
        lag: int = 0,
        num_drafters: int = 1,
        trace: Trace | None = None,
    ) -> None:
        self.world, self.lm = world, lm
        limits = growth_limits(pipeline, shape)
        of_each = registry.num_drafters(pipeline, num_drafters)
        self.pool = DraftPool(
            channels,
            arrivals,
            limits=lambda _: limits,
            vocab_size=lm.vocab_size,
            clock=world,
            num_drafters=lambda _: of_each,
            trace=trace,
        )
        self.engine = TargetEngine(
            TargetModel(runner=lm, vocab_size=lm.vocab_size, eos_ids=eos_ids, detokenizer=_letters(lag)),
            verifier=make_verifier("coupled"),
            drafting=self.pool,
            remote=self.pool,
            shape=shape,
            make_pipeline=PIPELINES[pipeline],
            clock=world,
            trace=trace,
        )
        self.stalls: list[float] = []

    def start(self, prompt: Sequence[int], params: SamplingParams, **request: Any) -> Finished:
        """Admits a request; ``step`` runs it."""
        ids = np.array(prompt, np.int64)
        run = self.engine.start(Request(prompt_ids=ids, params=params, **request))
        assert run.enter()
        return Finished(run)

    def step(self, running: Sequence[Finished]) -> None:
        """One step of all these requests; each must commit something, none may stall."""
        began, spent = self.world.now, self.lm.seconds
        assert all(each.run.make_room() for each in running)
        outputs = self.engine.step([each.run for each in running])
        self.stalls.append(self.world.now - began - (self.lm.seconds - spent))
        assert self.stalls[-1] <= MAX_STALL + 1e-9, f"a step was held back for {self.stalls[-1]} s"
        for each, output in zip(running, outputs, strict=True):
            assert output is not None
            assert output.token_ids, "a target forward committed nothing"
            each.steps.append(output)
            each.times.append(self.world.now)

    def finish(self, running: Sequence[Finished], between: Callable[[], None] = lambda: None) -> None:
        """Steps requests to their ends and closes them; ``between`` is called after every step."""
        while active := [each for each in running if not each.run.finished]:
            self.step(active)
            between()
        for each in running:
            each.run.close()

    def serve(self, prompt: Sequence[int], params: SamplingParams, **request: Any) -> Finished:
        """One request from beginning to end."""
        finished = self.start(prompt, params, **request)
        self.finish([finished])
        return finished


def _letters(lag: int) -> Callable[[Request], TextSource]:
    return lambda _: Letters(lag)


class Deployment:
    """A world of targets that all know all workers.

    draft: the workers' table, or each one's, by default the target's own. pace: the first is the target's
    if there is one for each worker. per_request: workers that
    draft for a request. faults: to the workers, to the targets, of every link but those of the last
    ``sound`` workers. skip: see ``TableDraftEngine``. trace: makes one for a clock; the first
    target's.
    """

    def __init__(
        self,
        lm: TableLM,
        *,
        draft: TableLM | Sequence[TableLM] | None = None,
        pipeline: str = "parallel",
        shape: TreeShape | None = None,
        pace: Pace | Sequence[Pace] | None = None,
        num_targets: int = 1,
        num_workers: int = 1,
        per_request: int = 1,
        max_sessions: int = 8,
        faults: tuple[Faults, Faults] = (faultless, faultless),
        sound: int = 0,
        skip: int = 0,
        eos_ids: tuple[int, ...] = (),
        lag: int = 0,
        trace: Callable[[VirtualClock], Trace] | None = None,
    ) -> None:
        self.world = VirtualClock()
        paces = pace if isinstance(pace, Sequence) else [pace or Pace()]
        self.pace = paces[0]
        self.engines: list[TableDraftEngine] = []
        self.workers: list[VirtualWorker] = []
        tables = draft if isinstance(draft, Sequence) else [draft or lm] * num_workers
        for table, own in zip(tables, cycle(paces), strict=False):
            busy = BusyTime(self.world)
            self.engines.append(TableDraftEngine(table, busy, own.draft, skip=skip))
            self.workers.append(VirtualWorker(self.world, DraftWorker(self.engines[-1], clock=busy), busy))
        self.links: list[list[VirtualLink]] = []
        self.targets: list[Target] = []
        for _ in range(num_targets):
            faulty = [faults] * (len(self.workers) - sound) + [(faultless, faultless)] * sound
            links = [
                self._link(worker, f"draft-{index}", lm.vocab_size, max_sessions, faults, own.delay)
                for index, (worker, faults, own) in enumerate(
                    zip(self.workers, faulty, cycle(paces), strict=False)
                )
            ]
            self.links.append(links)
            self.targets.append(
                Target(
                    self.world,
                    TimedTable(lm, self.world, self.pace),
                    links,
                    VirtualArrivals(self.world, links),
                    pipeline=pipeline,
                    shape=shape or TreeShape(),
                    eos_ids=eos_ids,
                    lag=lag,
                    num_drafters=per_request,
                    trace=None if trace is None or self.targets else trace(self.world),
                )
            )
        for target in self.targets:
            target.pool.wait_for_workers(1.0)

    @property
    def target(self) -> Target:
        return self.targets[0]

    @property
    def num_sessions(self) -> int:
        """Of all workers together."""
        return sum(worker.worker.num_sessions for worker in self.workers)

    def settle(self, seconds: float = 1.0) -> None:
        """Lets everything arrive that is on its way."""
        self.world.advance(seconds)
        for worker in self.workers:
            worker.wake()
        self.world.advance(seconds)
        for target in self.targets:
            target.pool.poll()

    def require_empty(self, *, expired: bool = False) -> None:
        """Nobody holds a session any more; if ``expired``, once those nobody speaks for are forgotten."""
        self.settle()
        if expired:
            self.settle(FOREVER)
        assert self.num_sessions == 0, "a worker drafts for nobody"
        assert all(target.pool.num_sessions == 0 for target in self.targets), "the pool holds a session"
        assert all(session.closed for engine in self.engines for session in engine.sessions)
        assert all(sequence.closed for target in self.targets for sequence in target.lm.sequences)

    def _link(
        self,
        worker: VirtualWorker,
        name: str,
        vocab_size: int,
        max_sessions: int,
        faults: tuple[Faults, Faults],
        delay: float,
    ) -> VirtualLink:
        down, up = faults
        return VirtualLink(
            self.world,
            worker,
            hello=hello_for(vocab_size),
            welcome=welcome_of(name, vocab_size, max_sessions),
            delay=delay,
            to_worker=down,
            to_target=up,
        )


def hello_for(vocab_size: int) -> Hello:
    return Hello(
        protocol_version=PROTOCOL_VERSION,
        model="table",
        vocab_hash="letters",
        vocab_size=vocab_size,
        eos_ids=(),
        numerics="canonical",
    )


def welcome_of(name: str, vocab_size: int, max_sessions: int = 8) -> Welcome:
    return Welcome(
        protocol_version=PROTOCOL_VERSION,
        name=name,
        model="table",
        vocab_hash="letters",
        vocab_size=vocab_size,
        numerics="fast",
        max_model_len=1000,
        max_sessions=max_sessions,
    )


def plain(lm: TableLM, prompt: Sequence[int], params: SamplingParams) -> list[int]:
    """The tokens of plain decoding, by definition; of requests that only their length ends."""
    if params.is_greedy:
        return lm.greedy(list(prompt), params.max_tokens)
    return lm.sampled(list(prompt), params.max_tokens, params.seed or 0)


class Recorded:
    """A fault-free direction of a link that notes what is sent."""

    def __init__(self) -> None:
        self.messages: list[TargetMessage | DrafterMessage] = []

    def __call__(self, index: int, message: TargetMessage | DrafterMessage) -> Sequence[float]:
        assert index == len(self.messages)
        self.messages.append(message)
        return (0.0,)


def fault_at(index: int, copies: Sequence[float]) -> Faults:
    """Only one message suffers: its copies come so much later, or there are none."""
    return lambda number, _: copies if number == index else (0.0,)
