"""Requests that share an engine's steps: they join and leave between two."""

from collections import deque
from dataclasses import dataclass, field

from outrider.actors.request_run import RequestRun
from outrider.actors.target_engine import TargetEngine
from outrider.speculation.errors import OutriderError
from outrider.speculation.request import Completion, Request, StepOutput


@dataclass(slots=True, eq=False)
class Ticket:
    """One submitted request. In the end it has a completion or an error, unless it was cancelled."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    run: RequestRun | None = None
    completion: Completion | None = None
    error: OutriderError | None = None

    @property
    def finished(self) -> bool:
        """Whether no further step will come."""
        return self.completion is not None or self.error is not None


class RunningBatch:
    """Serves requests first come first served, at most ``max_num_seqs`` at once.

    Plain Python on the caller's thread; ``EngineLoop`` gives it one of its own.
    """

    def __init__(self, engine: TargetEngine, max_num_seqs: int) -> None:
        self._engine, self._max_num_seqs = engine, max_num_seqs
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []

    @property
    def num_running(self) -> int:
        """Requests that the next step serves, but for those it admits."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that found no room yet."""
        return len(self._waiting)

    @property
    def room(self) -> int:
        """Requests that could join the next step at once."""
        return self._max_num_seqs - len(self._running) - len(self._waiting)

    def submit(self, request: Request) -> Ticket:
        """Queues a request."""
        ticket = Ticket(request)
        self._waiting.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Drops a request, wherever it stands; what it holds is free afterwards."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        if ticket in self._running:
            self._leave(ticket)

    def step(self) -> list[tuple[Ticket, StepOutput | None]]:
        """Admits what has room and takes one target step.

        Returns what it brought each request; no output for one that could not be admitted.
        """
        refused: list[tuple[Ticket, StepOutput | None]] = []
        while self._waiting and len(self._running) < self._max_num_seqs:
            ticket = self._waiting.popleft()
            try:
                ticket.run = self._engine.start(ticket.request)
            except OutriderError as error:
                ticket.error = error
                refused.append((ticket, None))
            else:
                self._running.append(ticket)
        if not self._running:
            return refused
        running = list(self._running)
        runs = [ticket.run for ticket in running if ticket.run is not None]
        outputs = self._engine.step(runs)
        for ticket, output in zip(running, outputs, strict=True):
            self._note(ticket, output)
        return [*refused, *zip(running, outputs, strict=True)]

    def close(self) -> None:
        """Drops everything."""
        self._waiting.clear()
        for ticket in list(self._running):
            self._leave(ticket)

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
            )
        self._leave(ticket)

    def _leave(self, ticket: Ticket) -> None:
        assert ticket.run is not None
        self._running.remove(ticket)
        ticket.run.close()
