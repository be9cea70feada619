"""A target in this very process."""

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from outrider.cluster.api.backend import Health, UnavailableError
from outrider.cluster.engine_service import EngineService
from outrider.cluster.llm import LLM
from outrider.cluster.model_card import ModelCard
from outrider.speculation.request import Completion, Request, StepOutput


class LocalBackend:
    """Implements ``Backend``. Made on the event loop that uses it, which owns the model from then on."""

    def __init__(self, llm: LLM) -> None:
        self.card = ModelCard.of(llm)
        self._service = EngineService(llm)

    @property
    def serving(self) -> int:
        """See ``Backend``."""
        return int(not self._service.ended.done())

    async def failure(self) -> None:
        """Raises what ended the engine, once that has happened."""
        await asyncio.shield(self._service.ended)

    async def stream(
        self, requests: Sequence[Request], interval: float
    ) -> AsyncGenerator[list[tuple[int, StepOutput | Completion]]]:
        """See ``Backend``."""
        if not self.serving:
            raise UnavailableError("the engine has ended")
        async with aclosing(self._service.stream(requests, interval)) as lots:
            async for events in lots:
                for event in events:
                    if event.error is not None:
                        raise event.error
                yield [
                    (event.index, item)
                    for event in events
                    for item in (event.output, event.completion)
                    if item is not None
                ]

    async def health(self) -> Health:
        """See ``Backend``."""
        row = {"name": self.card.name, "role": "target", "pid": os.getpid()}
        if not self.serving:
            gone = {**row, "phase": "failed", "note": str(self._service.ended.exception())}
            return Health(serving=0, running=0, waiting=0, kv_cache_usage=0.0, drafters=0, members=[gone])
        figures = await self._service.figures()
        workers = [
            {"name": name, "role": "draft", "phase": "ready", "note": "", "address": address}
            for address, name in (await self._service.between_steps(self._connected)).items()
        ]
        workers += [
            {"name": address, "role": "draft", "phase": "failed", "note": line, "address": address}
            for address, line in figures.failures.items()
        ]
        return Health(
            serving=1,
            running=figures.running,
            waiting=figures.waiting,
            kv_cache_usage=figures.kv_cache_usage,
            drafters=figures.drafters,
            members=[{**row, "phase": "ready", "note": ""}, *workers],
        )

    def _connected(self) -> dict[str, str]:
        workers = self._service.llm.workers
        return {} if workers is None else workers.pool.connected

    async def close(self) -> None:
        """See ``Backend``."""
        await asyncio.to_thread(self._service.close)
