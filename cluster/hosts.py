"""What runs in a cluster's processes. Plain classes; ``ray_launcher`` makes actors of them.

Each is made light, so that it can be placed and asked where it is, and loads its model only in
``start``. Methods are coroutines: one that computes for long would keep the others waiting.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from outrider.actors.security import Security
from outrider.cluster.cluster_config import ClusterConfig, DraftPoolConfig
from outrider.cluster.component_logs import log_as
from outrider.cluster.directory import Place
from outrider.cluster.generation import Prompt
from outrider.cluster.interfaces import address_of
from outrider.speculation.errors import InvalidRequestError
from outrider.speculation.request import Request, StepEvent
from outrider.speculation.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSettings:
    """What one draft worker is. host: to listen on, or None for the node's own address."""

    name: str
    pool: DraftPoolConfig
    security: Security
    interface: str | None
    host: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSettings:
    """What one rank of a target group is. addresses: of the draft workers at the time."""

    name: str
    config: ClusterConfig
    security: Security
    addresses: list[str]


class Host:
    """What all processes of a cluster have in common."""

    def __init__(self, node: str) -> None:
        """node: how the others reach this machine, where no interface is chosen."""
        self.node = node

    async def place(self) -> Place:
        """Where this is; the first answer also says that it has been placed."""
        return Place(node=self.node, pid=os.getpid())


class DraftHost(Host):
    """One draft worker."""

    async def start(self, settings: DraftSettings) -> tuple[str, str]:
        """Loads the model and listens; the address, and the model's name.

        Raises:
            ModelError: the model cannot be loaded.
            InvalidConfigError: a setting is not possible on this node.
        """
        import torch

        log_as(settings.name)
        from outrider.cluster.draft_service import make_draft_process
        from outrider.models.demo import pair

        pool = settings.pool
        torch.set_num_threads(pool.num_threads)
        host = settings.host or (address_of(settings.interface) if settings.interface else self.node)
        self._process = await asyncio.to_thread(
            make_draft_process,
            pool.model or str(pair.DRAFT),
            dtype=pool.dtype,
            max_model_len=pool.max_model_len,
            max_sessions=pool.max_sessions,
            tensor_parallel_size=pool.tensor_parallel_size,
            host=host,
            port=0,
            name=settings.name,
            security=settings.security,
        )
        return self._process.address, self._process.model

    async def serve(self) -> dict[str, Any]:
        """Drafts until ``stop``; what it did."""
        return asdict(await asyncio.to_thread(self._process.run))

    async def stop(self) -> None:
        """Makes ``serve`` return."""
        self._process.stop()


class RankHost(Host):
    """A rank of a target that follows its rank 0, a ``TargetHost`` on the same node."""

    async def start(self, settings: TargetSettings, rank: int, port: int) -> None:
        """Joins the group whose store is at ``port``, loads its part of the model and begins to follow.

        Raises:
            TargetGroupError: the others did not come.
            ModelError: its part cannot be loaded.
        """
        import torch

        log_as(f"{settings.name}/{rank}")
        from outrider.actors.target_worker import follow
        from outrider.cluster.target_rank import RankSettings, join
        from outrider.models.parallel import LOOPBACK

        target = settings.config.target
        torch.set_num_threads(target.num_threads)
        rank_of_group = await asyncio.to_thread(
            join,
            RankSettings(
                rank=rank,
                size=target.tensor_parallel_size,
                host=LOOPBACK,
                port=port,
                model=target.model,
                dtype=target.dtype,
                numerics=target.numerics,
                max_model_len=target.max_model_len,
                threads=target.num_threads,
            ),
        )

        # Rank 0 runs its first steps before it is ready.
        self._following = asyncio.ensure_future(asyncio.to_thread(follow, *rank_of_group))

    async def serve(self) -> None:
        """Ends or raises with the group."""
        await self._following


class TargetHost(Host):
    """One target: an engine, and streams of steps to whoever asked for text."""

    async def open_group(self) -> int:
        """Opens the store in which the ranks of a group find each other; its port on this node."""
        from outrider.models.parallel import open_store

        self._store = await asyncio.to_thread(open_store)
        return int(self._store.port)

    async def start(self, settings: TargetSettings) -> None:
        """Loads the model. With several ranks ``open_group`` comes before, and theirs start meanwhile.

        Raises:
            ModelError: the model cannot be loaded.
            InvalidConfigError: a setting is not possible on this node.
        """
        log_as(settings.name)
        self._limits = settings.config.limits
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._load, settings)

    async def serve(self) -> None:
        """Returns never, but raises what ended the engine."""
        await self._ended

    async def draft_with(self, addresses: Sequence[str]) -> None:
        """From now on these workers draft."""
        drafters = self._llm.workers
        if drafters is not None:
            self._engine.order(lambda: drafters.replace(addresses))

    async def prepare(
        self, prompt: Prompt, params: SamplingParams, speculative: bool, pipeline: str | None
    ) -> tuple[str, list[Request]]:
        """See ``TextGenerator.prepare``."""
        for name, value in (("max_tokens", params.max_tokens), ("n", params.n)):
            limit = self._limits.max_tokens if name == "max_tokens" else self._limits.max_choices
            if limit is not None and value > limit:
                raise InvalidRequestError(f"{name} must be at most {limit} on this cluster, not {value}")
        return self._llm.prepare(prompt, params, speculative=speculative, pipeline=pipeline)

    async def generate(self, requests: Sequence[Request], interval: float) -> AsyncIterator[list[StepEvent]]:
        """Serves requests; what the engine's steps brought them, until all are finished.

        interval: seconds between two lots, unless one finishes a request; with 0 each step is one.
        """
        lots = _Lots(self._loop, interval)
        left = len(requests)
        call = self._engine.submit(requests, lots.bring)
        try:
            while left:
                events = await lots.take()
                left -= sum(_is_last(each) for each in events)
                yield events
        finally:
            if left:
                self._engine.cancel(call)

    async def status(self) -> dict[str, Any]:
        """Figures for people."""
        figures: asyncio.Future[dict[str, Any]] = self._loop.create_future()

        def look() -> None:
            self._loop.call_soon_threadsafe(figures.set_result, self._figures())

        self._engine.order(look)
        return await figures

    def _figures(self) -> dict[str, Any]:
        """On the engine's thread: it alone may look at the draft workers."""
        batch, workers = self._batch, self._llm.workers
        failures = self._llm.failures()
        return {
            "model": self._llm.model.folder.name,
            "max_num_seqs": self._llm.max_num_seqs,
            "running": batch.num_running,
            "waiting": batch.num_waiting,
            "steps": self._llm.engine.steps,
            "drafters": 0 if workers is None else workers.pool.num_connected,
            "failures": failures,
        }

    def _load(self, settings: TargetSettings) -> None:
        import torch

        from outrider.actors.engine_loop import EngineLoop
        from outrider.actors.running_batch import RunningBatch
        from outrider.cluster.cluster_security import TOKEN_VARIABLE
        from outrider.cluster.llm import LLM
        from outrider.models.parallel import RankGroup

        target = settings.config.target
        torch.set_num_threads(target.num_threads)
        if settings.security.token is not None:
            os.environ[TOKEN_VARIABLE] = settings.security.token
        size = target.tensor_parallel_size
        self._llm = LLM(
            target.model,
            ranks=None if size == 1 else RankGroup(self._store, 0, size),
            speculative_config=settings.config.speculative_config(settings.addresses),
            **target.engine_settings,
        )
        self._batch = RunningBatch(self._llm.engine, self._llm.max_num_seqs)
        self._engine = EngineLoop(self._batch, self._fail)

    def _fail(self, error: BaseException) -> None:
        def end() -> None:
            if not self._ended.done():
                self._ended.set_exception(error)

        self._loop.call_soon_threadsafe(end)


class _Lots:
    """Events on their way from the engine's thread to a caller.

    Every lot costs the engine time, for Python's threads take turns: about a tenth of a 30 ms step.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, interval: float) -> None:
        self._loop, self._interval = loop, interval
        self._arrived: asyncio.Queue[list[StepEvent]] = asyncio.Queue()
        self._gathered: list[StepEvent] = []
        self._due = 0.0

    def bring(self, events: list[StepEvent]) -> None:
        """On the engine's thread: what one step brought."""
        self._gathered += events
        now = time.monotonic()
        if now >= self._due or any(map(_is_last, events)):
            self._due = now + self._interval
            lot, self._gathered = self._gathered, []
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, lot)

    async def take(self) -> list[StepEvent]:
        """Everything that has arrived, at least one lot."""
        events = await self._arrived.get()
        # A step may have ended while the last one's events were on their way.
        while not self._arrived.empty():
            events += self._arrived.get_nowait()
        return events


def _is_last(event: StepEvent) -> bool:
    return event.completion is not None or event.error is not None
