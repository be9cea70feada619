"""A target engine on a thread of its own, for processes that serve several callers."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

from outrider.actors.running_batch import RunningBatch, Ticket
from outrider.speculation.request import Request, StepEvent

log = logging.getLogger(__name__)

Sink: TypeAlias = Callable[[list[StepEvent]], None]
"""Takes the events that one step brought a call; called on the engine's thread, must not block."""


class Call:
    """Requests that were submitted together."""

    def __init__(self, requests: Sequence[Request], sink: Sink) -> None:
        self.requests, self.sink = requests, sink
        self.tickets: dict[Ticket, int] = {}


class EngineLoop:
    """Runs a batch for as long as there are requests, and sleeps while there are none.

    on_failure: told, on the engine's thread, of an exception that ended the loop; requests in
    flight get no further events then. after_step: called there once every sink has what a step brought it.
    """

    def __init__(
        self,
        batch: RunningBatch,
        on_failure: Callable[[BaseException], None],
        *,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        self._batch, self._on_failure, self._after_step = batch, on_failure, after_step
        self._calls: dict[Ticket, Call] = {}
        self._orders: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request], sink: Sink) -> Call:
        """Queues requests from any thread."""
        call = Call(requests, sink)
        self.order(lambda: self._admit(call))
        return call

    def cancel(self, call: Call) -> None:
        """Drops what is left of a call, before the next step."""
        self.order(lambda: self._drop(call))

    def order(self, work: Callable[[], None]) -> None:
        """Does something on the engine's thread, between two steps."""
        with self._changed:
            self._orders.append(work)
            self._changed.notify()

    def close(self) -> None:
        """Drops all requests and waits for the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._await_work():
                while self._orders:
                    self._orders.popleft()()
                if self._calls:
                    self._step()
        except BaseException as error:  # whoever waits for events must hear of it
            self._on_failure(error)
        finally:
            self._batch.close()

    def _await_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._orders or self._calls or self._closed)
            return not self._closed

    def _step(self) -> None:
        events: dict[Call, list[StepEvent]] = {}
        for ticket, output in self._batch.step():
            call = self._calls[ticket]
            event = StepEvent(
                index=call.tickets[ticket], output=output, completion=ticket.completion, error=ticket.error
            )
            events.setdefault(call, []).append(event)
            if ticket.finished:
                del self._calls[ticket], call.tickets[ticket]
                _log_end(ticket)
        for call, brought in events.items():
            call.sink(brought)
        self._after_step()

    def _admit(self, call: Call) -> None:
        for index, request in enumerate(call.requests):
            log.info("request %s: %d prompt tokens", request.request_id, len(request.prompt_ids))
            ticket = self._batch.submit(request)
            call.tickets[ticket] = index
            self._calls[ticket] = call

    def _drop(self, call: Call) -> None:
        for ticket in call.tickets:
            log.info("request %s: cancelled", ticket.request.request_id)
            self._batch.cancel(ticket)
            del self._calls[ticket]
        call.tickets.clear()


def _log_end(ticket: Ticket) -> None:
    done = ticket.completion
    if done is None:
        log.warning("request %s: %s", ticket.request.request_id, ticket.error)
        return
    log.info(
        "request %s: %s after %d tokens in %d steps, %d tokens drafted",
        ticket.request.request_id,
        done.finish_reason,
        len(done.token_ids),
        done.stats.target_steps,
        done.stats.num_accepted_tokens,
    )
