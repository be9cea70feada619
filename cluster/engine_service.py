"""An ``LLM``'s engine on a thread of its own, for callers that share an event loop."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from outrider.actors.engine_loop import EngineLoop
from outrider.actors.running_batch import RunningBatch
from outrider.cluster.handover import Handover, Lots, is_last
from outrider.speculation.errors import TargetGroupError
from outrider.speculation.request import Request, StepEvent

if TYPE_CHECKING:
    from outrider.cluster.llm import LLM

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFigures:
    """One engine at one moment.

    kv_cache_usage: share of the KV blocks that requests hold. steps, preemptions: since it started.
    drafters: draft workers that are connected.
    """

    running: int
    waiting: int
    kv_cache_usage: float
    steps: int
    preemptions: int
    drafters: int
    failures: dict[str, str]


class EngineService:
    """Serves calls until ``close`` or until the engine fails, which ``ended`` then raises.

    Made on, and used from, one event loop.
    """

    def __init__(self, llm: "LLM") -> None:
        self.llm = llm
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._open: set[Lots] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._batch = RunningBatch(llm.engine, llm.max_num_seqs)
        self._handover = Handover(self._loop)
        self._engine = EngineLoop(self._batch, self._fail, after_step=self._handover.send)

    async def stream(self, requests: Sequence[Request], interval: float) -> AsyncGenerator[list[StepEvent]]:
        """What the engine's steps bring the requests, until all are finished.

        interval: seconds between two lots at most; with 0 each step is one, and one that finishes a request
        comes at once. What is left when the caller goes away is dropped before the next step.

        Raises:
            TargetGroupError: the engine ended.
        """
        lots = Lots(interval)
        left = len(requests)
        self._open.add(lots)
        self._idle.clear()
        call = self._engine.submit(requests, partial(self._handover.bring, lots))
        try:
            while left:
                self._require_engine()
                events = await lots.take()
                left -= sum(is_last(each) for each in events)
                yield events
        finally:
            self._open.discard(lots)
            if left:
                self._engine.cancel(call)
                self._engine.order(lambda: self._handover.forget(lots))
            if not self._open:
                self._idle.set()

    async def idle(self) -> None:
        """Until nobody is being served."""
        await self._idle.wait()

    async def figures(self) -> EngineFigures:
        """Looked up between two steps."""
        return await self.between_steps(self._figures)

    async def between_steps(self, work: Callable[[], T]) -> T:
        """What ``work`` returns on the engine's thread, which alone may look at what the engine uses.

        Raises:
            TargetGroupError: the engine ended.
        """
        result: asyncio.Future[T] = self._loop.create_future()

        def do() -> None:
            try:
                value = work()
            except Exception as error:  # of the work, not of the engine
                self._loop.call_soon_threadsafe(result.set_exception, error)
            else:
                self._loop.call_soon_threadsafe(result.set_result, value)

        self._engine.order(do)
        await asyncio.wait((result, self.ended), return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            self._require_engine()
        return await result

    def close(self) -> None:
        """Drops what is in flight, and ends what the model started."""
        self._engine.close()
        self.llm.close()

    def _require_engine(self) -> None:
        if self.ended.done():
            raise TargetGroupError(f"the engine ended: {self.ended.exception()}")

    def _figures(self) -> EngineFigures:
        workers = self.llm.workers
        return EngineFigures(
            running=self._batch.num_running,
            waiting=self._batch.num_waiting,
            kv_cache_usage=self.llm.kv_cache_usage,
            steps=self.llm.engine.steps,
            preemptions=self._batch.num_preemptions,
            drafters=0 if workers is None else workers.pool.num_connected,
            failures=self.llm.failures(),
        )

    def _fail(self, error: BaseException) -> None:
        """On the engine's thread."""

        def end() -> None:
            if not self.ended.done():
                self.ended.set_exception(error)
                # Whoever waits for steps hears of it there, and nobody need look at the future itself.
                self.ended.exception()
            for lots in self._open:
                lots.arrive([])

        self._loop.call_soon_threadsafe(end)
