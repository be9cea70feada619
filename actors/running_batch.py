"""Requests that share an engine's steps: they join and leave between two."""

from dataclasses import dataclass, field
from itertools import count

from outrider.actors.request_run import RequestRun
from outrider.actors.scheduler import Scheduler
from outrider.actors.target_engine import TargetEngine
from outrider.speculation.errors import OutOfBlocksError, OutriderError
from outrider.speculation.request import Completion, Request, StepOutput
from outrider.speculation.types import IntArray


@dataclass(slots=True, eq=False)
class Ticket:
    """One submitted request. In the end it has a completion or an error, unless it was cancelled.

    A ``Candidate``: its run begins when it is first let in, and outlives being preempted.
    """

    request: Request
    rank: tuple[int, int]
    engine: TargetEngine = field(repr=False)
    token_ids: list[int] = field(default_factory=list)
    run: RequestRun | None = None
    completion: Completion | None = None
    error: OutriderError | None = None

    @property
    def finished(self) -> bool:
        """Whether no further step will come."""
        return self.completion is not None or self.error is not None

    @property
    def text(self) -> IntArray:
        """See ``Candidate``."""
        return self.request.prompt_ids if self.run is None else self.run.committed

    @property
    def num_cached(self) -> int:
        """See ``Candidate``."""
        return 0 if self.run is None else self.run.num_cached

    @property
    def num_reusable(self) -> int:
        """See ``Candidate``."""
        if self.run is not None:
            return self.run.num_reusable
        return 0 if self.request.params.prompt_logprobs is not None else len(self.request.prompt_ids) - 1

    def enter(self, like: "tuple[Ticket, int] | None") -> bool:
        """See ``Candidate``."""
        if self.run is None:
            self.run = self.engine.start(self.request)
        return self.run.enter(None if like is None or like[0].run is None else (like[0].run, like[1]))

    def leave(self) -> None:
        """See ``Candidate``."""
        assert self.run is not None
        self.run.leave()

    def make_room(self) -> bool:
        """See ``Candidate``."""
        assert self.run is not None
        return self.run.make_room()

    def close(self) -> None:
        """Frees all that it holds."""
        if self.run is not None:
            self.run.close()


class RunningBatch:
    """Serves requests, at most ``max_num_seqs`` at once.

    Plain Python on the caller's thread; ``EngineLoop`` gives it one of its own.
    """

    def __init__(self, engine: TargetEngine, max_num_seqs: int) -> None:
        self._engine, self._max_num_seqs = engine, max_num_seqs
        self._scheduler: Scheduler[Ticket] = Scheduler(max_num_seqs)
        self._arrivals = count()

    @property
    def num_running(self) -> int:
        """Requests that the next step serves, but for those it admits."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests that found no room yet, or lost it."""
        return len(self._scheduler.waiting)

    @property
    def num_preemptions(self) -> int:
        """How often a request had to leave for want of room."""
        return self._scheduler.num_preemptions

    @property
    def room(self) -> int:
        """Requests that could join the next step at once."""
        return self._max_num_seqs - self.num_running - self.num_waiting

    def submit(self, request: Request) -> Ticket:
        """Queues a request."""
        ticket = Ticket(request, (request.priority, next(self._arrivals)), self._engine)
        self._scheduler.add(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Drops a request, wherever it stands; what it holds is free afterwards."""
        self._scheduler.remove(ticket)
        ticket.close()

    def step(self) -> list[tuple[Ticket, StepOutput | None]]:
        """Admits what has room and takes one target step.

        Returns what it brought each request that it brought something; no output for one that
        cannot be served.
        """
        brought: list[tuple[Ticket, StepOutput | None]] = []
        for ticket, error in self._scheduler.next_step():
            ticket.error = error
            ticket.close()
            brought.append((ticket, None))
        running = list(self._scheduler.running)
        if not running:
            return brought + self._give_up_stuck()
        outputs = self._engine.step([ticket.run for ticket in running if ticket.run is not None])
        for ticket, output in zip(running, outputs, strict=True):
            if output is not None:
                self._note(ticket, output)
                brought.append((ticket, output))
        return brought

    def close(self) -> None:
        """Drops everything."""
        for ticket in [*self._scheduler.running, *self._scheduler.waiting]:
            self.cancel(ticket)

    def _give_up_stuck(self) -> list[tuple[Ticket, StepOutput | None]]:
        """Ends a request that does not fit although nobody else runs."""
        for ticket in self._scheduler.waiting[:1]:
            ticket.error = OutOfBlocksError(f"a text of {len(ticket.text)} tokens does not fit the KV cache")
            self.cancel(ticket)
            return [(ticket, None)]
        return []

    def _note(self, ticket: Ticket, output: StepOutput) -> None:
        run = ticket.run
        assert run is not None
        ticket.token_ids += output.token_ids
        if not run.finished:
            return
        if run.error is not None:
            ticket.error = run.error
        else:
            assert output.finish_reason is not None
            ticket.completion = Completion(
                index=ticket.request.choice,
                text=run.text,
                token_ids=ticket.token_ids,
                finish_reason=output.finish_reason,
                stop_reason=output.stop_reason,
                stats=run.stats,
                logprobs=run.logprobs.output,
                prompt_logprobs=run.logprobs.prompt,
            )
        self.cancel(ticket)
