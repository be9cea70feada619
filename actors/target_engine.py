"""The target side: requests go from prompt to finish in steps of schedule, run, commit."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol

import torch

from outrider.actors.drafting import DraftEngine
from outrider.actors.request_run import Pipeline, RequestRun
from outrider.actors.runner import AnySequence, TargetRunner
from outrider.models.numerics import MAX_ROWS
from outrider.speculation.pipelines.actions import Verify
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.pipelines.registry import PIPELINES
from outrider.speculation.pipelines.serial import SerialPipeline
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.request import Request, StepOutput
from outrider.speculation.selection import share_budget
from outrider.speculation.stopping import TextSource
from outrider.speculation.tree import DraftTree
from outrider.speculation.types import Verdict, Verifier

Clock = Callable[[], float]
MakePipeline = Callable[[TreeShape, CostEstimates], Any]


@dataclass(frozen=True, kw_only=True)
class TargetModel(Generic[AnySequence]):
    """What the engine must know of its target.

    vocab_size: real tokens; the head may be padded beyond them.
    detokenizer: makes a fresh one for each request.
    """

    runner: TargetRunner[AnySequence]
    vocab_size: int
    eos_ids: tuple[int, ...]
    detokenizer: Callable[[Request], TextSource]


class RemoteDrafting(Protocol):
    """Drafters in other processes; see ``DraftPool``."""

    def poll(self, busy: tuple[float, float]) -> None: ...

    def wait(self, seconds: float) -> None: ...


class TargetEngine:
    """Serves requests, several in one step, with or without a drafter.

    drafting: opens a draft session per request. remote: takes in what drafters in other
    processes have sent; the same object as ``drafting`` where these are used.
    make_pipeline: one for each request that names none; ``serial`` in one process by default.
    """

    def __init__(
        self,
        target: TargetModel[Any],
        *,
        verifier: Verifier,
        drafting: DraftEngine | None,
        shape: TreeShape,
        remote: RemoteDrafting | None = None,
        make_pipeline: MakePipeline = SerialPipeline,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.target, self.verifier, self.drafting, self.shape = target, verifier, drafting, shape
        self.clock, self.costs = clock, CostEstimates()
        self.steps, self.reconcile_seconds = 0, 0.0
        """Target steps, and the time that taking in remote growth took between them."""
        self._remote, self._make_pipeline = remote, make_pipeline
        self._busy = (0.0, 0.0)

    def make_pipeline(self, request: Request) -> Pipeline:
        """A new request's."""
        make: MakePipeline = self._make_pipeline if request.pipeline is None else PIPELINES[request.pipeline]
        pipeline: Pipeline = make(self.shape, self.costs)
        return pipeline

    def start(self, request: Request) -> RequestRun:
        """Admits a request and caches its prompt.

        Raises:
            InvalidRequestError: the prompt or a token id does not fit the model.
        """
        return RequestRun(self, request)

    def step(self, runs: Sequence[RequestRun]) -> list[StepOutput]:
        """One target step of all these requests, at most ``MAX_ROWS``.

        Each commits at least one token, or has its ``error`` set and is finished.
        """
        trees = self._schedule(runs)
        verdicts = self._run(runs, trees)
        return [run.commit(tree, verdict) for run, tree, verdict in zip(runs, trees, verdicts, strict=True)]

    def _schedule(self, runs: Sequence[RequestRun]) -> list[DraftTree]:
        """Waits for drafters where that pays; the subtree of each request to verify."""
        budgets = self._decide(runs)
        if len(runs) > 1:
            scores = [run.best_scores(budget) for run, budget in zip(runs, budgets, strict=True)]
            budgets = share_budget(scores, self.costs.curve(MAX_ROWS))
        return [run.select(budget) for run, budget in zip(runs, budgets, strict=True)]

    def _decide(self, runs: Sequence[RequestRun]) -> list[int]:
        """Most nodes that each request wants verified."""
        budgets: dict[int, int] = {}
        while True:
            self._take_growth()
            deadlines = []
            for index, run in enumerate(runs):
                if index not in budgets:
                    action = run.decide(self.clock)
                    if isinstance(action, Verify):
                        budgets[index] = action.budget
                    else:
                        deadlines.append(action.until)
            if not deadlines:
                return [budgets[index] for index in range(len(runs))]
            self._hold_back([run for index, run in enumerate(runs) if index not in budgets], min(deadlines))

    def _take_growth(self) -> None:
        if self._remote is not None:
            began = self.clock()
            self._remote.poll(self._busy)
            self.reconcile_seconds += self.clock() - began

    def _hold_back(self, waiting: Sequence[RequestRun], until: float) -> None:
        """Waits for growth; rows without reason to wait wait too, for one forward serves all."""
        assert self._remote is not None, "only remote drafters are waited for"
        began = self.clock()
        self._remote.wait(until - began)
        for run in waiting:
            run.stats.wait_seconds += self.clock() - began

    @torch.inference_mode()
    def _run(self, runs: Sequence[RequestRun], trees: Sequence[DraftTree]) -> list[Verdict]:
        """One forward of the target, and what it says of the trees."""
        began = self.clock()
        logits = self.target.runner.verify([run.query(tree) for run, tree in zip(runs, trees, strict=True)])
        verdicts = [run.judge(tree, each) for run, tree, each in zip(runs, trees, logits, strict=True)]
        ended = self.clock()
        self.steps += 1
        self._busy = (began, ended)
        self.costs.observe_target_step(len(runs) + sum(map(len, trees)), ended - began)
        for run, tree, verdict in zip(runs, trees, verdicts, strict=True):
            run.observe(tree, verdict, (ended - began) / len(runs))
        return verdicts
