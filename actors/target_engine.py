"""The target side: requests go from prompt to finish in steps of schedule, run, commit."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol

import torch

from outrider.actors.drafting import DraftEngine, LocalDraftEngine, PredictionEngine
from outrider.actors.request_run import Pipeline, RequestRun
from outrider.actors.runner import AnySequence, TargetRunner
from outrider.actors.scheduler import share_rows
from outrider.actors.tracing import Trace
from outrider.models.device import CPU
from outrider.models.numerics import MAX_ROWS
from outrider.speculation.logprobs import answer_together
from outrider.speculation.pipelines import serial
from outrider.speculation.pipelines.actions import Choice, Linger, Verify, Wait
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.pipelines.parallel import ParallelPipeline
from outrider.speculation.pipelines.prediction import PredictionPipeline
from outrider.speculation.pipelines.registry import PIPELINES
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.request import Request, StepOutput
from outrider.speculation.sampling import choose_together, cut
from outrider.speculation.selection import share_budget
from outrider.speculation.stopping import TextSource
from outrider.speculation.tree import DraftTree
from outrider.speculation.types import Verdict, Verifier

log = logging.getLogger(__name__)

Clock = Callable[[], float]
MakePipeline = Callable[[TreeShape, CostEstimates], Any]


@dataclass(frozen=True, kw_only=True)
class TargetModel(Generic[AnySequence]):
    """What the engine must know of its target.

    vocab_size: real tokens; the head may be padded beyond them.
    detokenizer: makes a fresh one for each request.
    device: where the runner's logits are.
    """

    runner: TargetRunner[AnySequence]
    vocab_size: int
    eos_ids: tuple[int, ...]
    detokenizer: Callable[[Request], TextSource]
    device: torch.device = CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one request does in a step.

    It caches ``count`` tokens; where that is all of them it verifies a tree, else tree is None.
    """

    run: RequestRun
    count: int
    tree: DraftTree | None

    @property
    def num_rows(self) -> int:
        return self.count + (0 if self.tree is None else len(self.tree))


class RemoteDrafting(Protocol):
    """Drafters in other processes; see ``DraftPool``."""

    def poll(self, busy: tuple[float, float]) -> None: ...

    def wait(self, seconds: float) -> None: ...


class TargetEngine:
    """Serves requests, several in one step, with or without a drafter.

    drafting: opens a draft session per request. remote: takes in what drafters in other
    processes have sent; the same object as ``drafting`` where these are used.
    make_pipeline: one for each request that names none, where drafters are in other processes.
    costs: what steps take, as far as it is known beforehand. max_rows: of one forward.
    trace: is told what happens, and when.
    """

    def __init__(
        self,
        target: TargetModel[Any],
        *,
        verifier: Verifier,
        drafting: DraftEngine | None,
        shape: TreeShape,
        remote: RemoteDrafting | None = None,
        make_pipeline: MakePipeline = ParallelPipeline,
        costs: CostEstimates | None = None,
        max_rows: int = MAX_ROWS,
        clock: Clock = time.perf_counter,
        trace: Trace | None = None,
    ) -> None:
        self.target, self.verifier, self.drafting, self.shape = target, verifier, drafting, shape
        self.clock, self.max_rows, self.trace = clock, max_rows, trace
        self.costs = costs or CostEstimates(max_rows=max_rows)
        self.steps, self.reconcile_seconds = 0, 0.0
        """Target steps, and the time that taking in remote growth took between them."""
        self._predictions = PredictionEngine(shape.num_speculative_tokens)
        self._remote, self._make_pipeline = remote, make_pipeline
        self._busy = (0.0, 0.0)
        self.drafted = False
        """Whether the last step had anything to do with drafts."""
        self._complained = False

    def drafting_of(self, request: Request) -> DraftEngine | None:
        """Who drafts for a request: its own prediction, if it brings one, and nobody else."""
        return self.drafting if request.prediction_ids is None else self._predictions

    def make_pipeline(self, request: Request) -> Pipeline:
        """A new request's, where nobody drafts in this process."""
        make: MakePipeline = self._make_pipeline if request.pipeline is None else PIPELINES[request.pipeline]
        if request.prediction_ids is not None:
            make = PredictionPipeline
        pipeline: Pipeline = make(self.shape, self.costs)
        return pipeline

    def start(self, request: Request) -> RequestRun:
        """A request that has yet to enter.

        Raises:
            InvalidRequestError: the prompt or a token id does not fit the model.
        """
        return RequestRun(self, request)

    def step(self, runs: Sequence[RequestRun]) -> list[StepOutput | None]:
        """One target step of all these requests, at most ``max_rows``, all of which have room.

        Each commits at least one token, or has its ``error`` set and is finished; None where only
        a piece of its text was cached.
        """
        began = self.clock()
        parts = self._schedule(runs)
        verdicts = self._run(parts)
        outputs = [
            None if part.tree is None or verdict is None else part.run.commit(part.tree, verdict)
            for part, verdict in zip(parts, verdicts, strict=True)
        ]
        if self.trace is not None:
            self.trace.stepped((began, self.clock()), self._busy, parts, verdicts, outputs)
        if self.shape.adaptive and isinstance(self.drafting, LocalDraftEngine):
            self._keep_record(parts, outputs, self.clock() - began)
        elif self.shape.adaptive and self._remote is not None:
            self._keep_record_elsewhere(parts, outputs, self.clock() - began)
        return outputs

    def _schedule(self, runs: Sequence[RequestRun]) -> list[Part]:
        """Waits for drafters where that pays; each request's rows."""
        counts = share_rows([run.num_pending for run in runs], self.max_rows)
        asking = [run for run, count in zip(runs, counts, strict=True) if count == run.num_pending]
        trees = dict(zip(asking, self._trees(asking, sum(counts), len(runs)), strict=True))
        return [
            Part(run=run, count=count, tree=trees.get(run)) for run, count in zip(runs, counts, strict=True)
        ]

    def _trees(self, runs: Sequence[RequestRun], text_rows: int, company: int) -> list[DraftTree]:
        """What to verify for requests whose last tokens are cached in this step, beside the text.

        company: requests in the step, with the others.
        """
        if not runs:
            return []
        if isinstance(self.drafting, LocalDraftEngine):
            budgets = self._drafted_here(runs, text_rows, company, self.drafting)
        else:
            budgets = self._drafted_elsewhere(runs, text_rows)
        return [run.select(budget) for run, budget in zip(runs, budgets, strict=True)]

    def _drafted_here(
        self, runs: Sequence[RequestRun], text_rows: int, company: int, drafting: LocalDraftEngine
    ) -> list[int]:
        """Has trees grow while that pays; most nodes of each to verify."""
        given = [index for index, run in enumerate(runs) if run.is_predicted]
        others = company - len(given)
        may_pay = serial.may_pay(self.shape, self.costs, others, with_texts=text_rows > len(runs))
        if may_pay:
            for run in runs:
                run.open_draft()
        drafts = [run.draft for run in runs]
        trees = [None if draft is None else draft.tree for draft in drafts]
        this_round = serial.SerialRound(self.shape, self.costs, trees, text_rows, given, drafts=may_pay)
        self.drafted = False
        while growers := this_round.growers():
            began = self.clock()
            for index in growers:
                runs[index].tell_draft()
            rows = drafting.grow([drafts[index] for index in growers], self.shape.width)
            seconds = self.clock() - began
            if self.trace is not None:
                self.trace.drafted((began, began + seconds), [runs[index] for index in growers], rows)
            this_round.observe_growth(growers, rows, seconds)
            total = max(1, sum(rows))
            for index, count in zip(growers, rows, strict=True):
                runs[index].observe_growth(count, seconds * count / total)
            self.drafted = True
        budgets = this_round.budgets()
        self.drafted |= any(count for index, count in enumerate(budgets) if index not in given)
        return budgets

    def _drafted_elsewhere(self, runs: Sequence[RequestRun], text_rows: int) -> list[int]:
        """Waits for drafters in other processes where that pays; most nodes of each to verify."""
        self.costs.company, self.costs.with_texts = len(runs), text_rows > len(runs)
        budgets = self._decide(runs)
        if len(runs) == 1:
            return [min(budgets[0], self.max_rows - text_rows)]
        scores = [run.best_scores(budget) for run, budget in zip(runs, budgets, strict=True)]
        return share_budget(scores, self.costs.curve(self.max_rows), text_rows - len(runs))

    def _decide(self, runs: Sequence[RequestRun]) -> list[int]:
        """Most nodes that each request wants verified."""
        began = self.clock()
        choices: dict[RequestRun, Choice] = {}
        budgets: dict[RequestRun, int] = {}
        while True:
            self._take_growth()
            now = self.clock()
            open_runs = [run for run in runs if run not in budgets]
            actions = [run.decide(now) for run in open_runs]
            offers = [action for action in actions if isinstance(action, Linger)]
            deadlines = [action.until for action in actions if isinstance(action, Wait)]
            # Who waits for an answer makes everybody wait; only without that is it a question of gain.
            linger = self.costs.linger
            until = min(deadlines) if deadlines else linger.hold_until(offers, len(runs), began, now)
            for run, action in zip(open_runs, actions, strict=True):
                if isinstance(action, Verify) or (isinstance(action, Linger) and until is None):
                    budgets[run] = action.budget
                choices[run] = _choice(action, choices.get(run), held=until is not None)
            if until is None:
                helped = any(choice is not Choice.OFF for choice in choices.values())
                self.drafted = helped and self.drafting is not None
                for run, choice in choices.items():
                    run.observe_choice(choice)
                return [budgets[run] for run in runs]
            self._hold_back([run for run in runs if run not in budgets], until)

    def _take_growth(self) -> None:
        if self._remote is not None:
            began = self.clock()
            self._remote.poll(self._busy)
            ended = self.clock()
            self.reconcile_seconds += ended - began
            if self.trace is not None:
                self.trace.took_growth((began, ended))

    def _hold_back(self, waiting: Sequence[RequestRun], until: float) -> None:
        """Waits for growth; rows without reason to wait wait too, for one forward serves all."""
        assert self._remote is not None, "only remote drafters are waited for"
        began = self.clock()
        self._remote.wait(until - began)
        if self.trace is not None:
            self.trace.waited((began, self.clock()), waiting)
        for run in waiting:
            run.stats.wait_seconds += self.clock() - began

    @torch.inference_mode()
    def _run(self, parts: Sequence[Part]) -> list[Verdict | None]:
        """One forward of the target, and what it says of the trees."""
        began = self.clock()
        logits = self.target.runner.verify([part.run.query(part.count, part.tree) for part in parts])
        verdicts = self._judge(parts, logits)
        self._tell_logprobs(parts, logits, verdicts)
        ended = self.clock()
        self.steps += 1
        self._busy = (began, ended)
        rows = sum(part.num_rows for part in parts)
        self.costs.observe_target_step(rows, ended - began)
        for part, verdict in zip(parts, verdicts, strict=True):
            share = (ended - began) * part.num_rows / rows
            if part.tree is None or verdict is None:
                part.run.observe_prefill(share)
            else:
                part.run.observe(part.tree, verdict, share)
        return verdicts

    def _judge(self, parts: Sequence[Part], logits: Sequence[torch.Tensor]) -> list[Verdict | None]:
        """Chooses the target's own tokens at every row that asks, and follows them down the trees."""
        asking = [
            (part.run, part.tree, each if len(each) == 1 + len(part.tree) else each[-1 - len(part.tree) :])
            for part, each in zip(parts, logits, strict=True)
            if part.tree is not None
        ]
        if not asking:
            return [None] * len(parts)
        tokens = choose_together(
            [run.chooser for run, _, _ in asking],
            self._processed(asking),
            [run.positions(tree) for run, tree, _ in asking],
        )
        if self.trace is not None:
            self.trace.judged(tokens)
        verdicts = (
            self.verifier.verify(tree, each) for (_, tree, _), each in zip(asking, tokens, strict=True)
        )
        return [None if part.tree is None else next(verdicts) for part in parts]

    def _tell_logprobs(
        self, parts: Sequence[Part], logits: Sequence[torch.Tensor], verdicts: Sequence[Verdict | None]
    ) -> None:
        """Looks up what requests want to know of the rows that their tokens came from."""
        questions = [
            part.run.logprobs.ask(each, part.tree, verdict)
            for part, each, verdict in zip(parts, logits, verdicts, strict=True)
        ]
        answer_together([each for each in questions if each is not None], self.target.vocab_size)

    def _processed(self, asking: Sequence[tuple[RequestRun, DraftTree, torch.Tensor]]) -> torch.Tensor:
        """Logits ``[R, V]`` that tokens are chosen from."""
        if all(run.processor.is_trivial for run, _, _ in asking):
            return cut(torch.cat([each for _, _, each in asking]), self.target.vocab_size)
        return torch.cat([run.processor.process(each, tree) for run, tree, each in asking])

    def _keep_record(
        self, parts: Sequence[Part], outputs: Sequence[StepOutput | None], seconds: float
    ) -> None:
        """Notes what a step brought those that are drafted for in this process, or could be.

        Not if it took in texts, which neither way does any better.
        """
        ours = [
            output
            for part, output in zip(parts, outputs, strict=True)
            if not part.run.is_predicted and output
        ]
        if ours and all(part.count == 1 for part in parts):
            rows = sum(part.num_rows if part.run.is_predicted else 1 for part in parts)
            self.costs.record.observe(
                len(ours),
                drafted=self.drafted,
                tokens=sum(len(output.token_ids) for output in ours),
                seconds=seconds,
                plain_seconds=float(self.costs.curve(self.max_rows)[rows - 1]),
            )

    def _keep_record_elsewhere(
        self, parts: Sequence[Part], outputs: Sequence[StepOutput | None], seconds: float
    ) -> None:
        """Notes what a step brought with drafters in other processes, if one was in reach.

        Not if it took in texts.
        """
        if not any(part.run.is_drafted_for for part in parts) or any(part.count > 1 for part in parts):
            return
        done = [output for output in outputs if output is not None]
        record, batch = self.costs.record_elsewhere, len(parts)
        record.observe(
            batch,
            drafted=self.drafted,
            tokens=sum(len(output.token_ids) for output in done),
            seconds=seconds,
            plain_seconds=float(self.costs.curve(self.max_rows)[batch - 1]),
        )
        if self.drafted:
            self.costs.linger.observe(
                batch,
                promised=sum(float(part.tree.scores.sum()) for part in parts if part.tree is not None),
                accepted=sum(output.num_accepted for output in done),
                seconds=seconds,
            )
        if record.has_stopped(batch) and not self._complained:
            self._complained = True
            log.info(
                "steps of %d requests were no faster with draft workers than without, so these rest for a "
                "while; a drafter in the target's own process, or none, may serve better here",
                batch,
            )


def _choice(action: Linger | Verify | Wait, before: Choice | None, *, held: bool) -> Choice:
    """How the step came about, as far as that is known."""
    if isinstance(action, Verify):
        return before or action.choice
    if isinstance(action, Wait):
        return Choice.WAITED
    return Choice.LINGERED if held else before or Choice.AT_ONCE
