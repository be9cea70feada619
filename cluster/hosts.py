"""What runs in a cluster's processes. Plain classes; ``ray_launcher`` makes actors of them.

Each is made light, so that it can be placed and asked where it is, and loads its model only in
``start``. Methods are coroutines: one that computes for long would keep the others waiting.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from outrider.actors.security import Security
from outrider.cluster.cluster_config import ClusterConfig, DraftPoolConfig
from outrider.cluster.component_logs import log_as
from outrider.cluster.directory import Place
from outrider.cluster.generation import Prompt
from outrider.cluster.interfaces import address_of
from outrider.cluster.model_card import ModelCard
from outrider.speculation.errors import InvalidRequestError
from outrider.speculation.request import Request, StepEvent
from outrider.speculation.sampling_params import SamplingParams

if TYPE_CHECKING:
    from outrider.cluster.llm import LLM


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
            device=pool.own_device,
            dtype=pool.dtype,
            max_model_len=pool.max_model_len,
            max_sessions=pool.max_sessions,
            tensor_parallel_size=pool.tensor_parallel_size,
            quantization=pool.quantization,
            host=host,
            port=0,
            name=settings.name,
            security=settings.security,
        )
        self._sessions, self._changed = 0, asyncio.Condition()
        loop = asyncio.get_running_loop()
        self._process.on_sessions = lambda count: _run_soon(self._note(count), loop)
        return self._process.address, self._process.model

    async def sessions_beside(self, known: int) -> int:
        """How many requests it drafts for, once these are others than ``known``."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._sessions != known)
        return self._sessions

    async def _note(self, sessions: int) -> None:
        async with self._changed:
            self._sessions = sessions
            self._changed.notify_all()

    async def serve(self) -> dict[str, Any]:
        """Drafts until ``stop``; what it did."""
        return asdict(await asyncio.to_thread(self._process.run))

    async def stop(self) -> None:
        """Makes ``serve`` return."""
        self._process.stop()


def _run_soon(work: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop) -> None:
    """From another thread."""
    asyncio.run_coroutine_threadsafe(work, loop)


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
        from outrider.cluster.loading import numerics_of
        from outrider.cluster.target_rank import RankSettings, join
        from outrider.models.device import choose_device
        from outrider.models.parallel import LOOPBACK

        target = settings.config.target
        # Ray shows a process its own devices only, so each rank's is the first that it sees.
        device = choose_device(target.own_device)
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
                numerics=str(numerics_of(target.numerics, device)),
                max_model_len=target.max_model_len,
                threads=target.num_threads,
                device=str(device),
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
        from outrider.cluster.engine_service import EngineService

        self._limits = settings.config.limits
        self._llm = await asyncio.to_thread(self._load, settings)
        self._service = EngineService(self._llm)

    async def serve(self) -> None:
        """Returns never, but raises what ended the engine."""
        await self._service.ended

    async def draft_with(self, addresses: Sequence[str]) -> None:
        """From now on these workers draft."""
        drafters = self._llm.workers
        if drafters is not None:
            await self._service.between_steps(lambda: drafters.replace(addresses))

    async def prepare(
        self, prompt: Prompt, params: SamplingParams, speculative: bool, pipeline: str | None
    ) -> tuple[str, list[Request]]:
        """See ``TextGenerator.prepare``."""
        for name, value in (("max_tokens", params.max_tokens), ("n", params.n)):
            limit = self._limits.max_tokens if name == "max_tokens" else self._limits.max_choices
            if limit is not None and value > limit:
                raise InvalidRequestError(f"{name} must be at most {limit} on this cluster, not {value}")
        return self._llm.prepare(prompt, params, speculative=speculative, pipeline=pipeline)

    async def describe(self) -> ModelCard:
        """What requests for this target are prepared with."""
        return await asyncio.to_thread(ModelCard.of, self._llm)

    async def generate(self, requests: Sequence[Request], interval: float) -> AsyncGenerator[list[StepEvent]]:
        """See ``EngineService.stream``."""
        async with aclosing(self._service.stream(requests, interval)) as lots:
            async for events in lots:
                yield events

    async def idle(self) -> None:
        """See ``EngineService``."""
        await self._service.idle()

    async def status(self) -> dict[str, Any]:
        """Figures for people."""
        figures = asdict(await self._service.figures())
        return {"model": self._llm.model.folder.name, "max_num_seqs": self._llm.max_num_seqs, **figures}

    def _load(self, settings: TargetSettings) -> "LLM":
        import torch

        from outrider.cluster.cluster_security import TOKEN_VARIABLE
        from outrider.cluster.llm import LLM
        from outrider.models.device import choose_device
        from outrider.models.parallel import RankGroup

        target = settings.config.target
        torch.set_num_threads(target.num_threads)
        if settings.security.token is not None:
            os.environ[TOKEN_VARIABLE] = settings.security.token
        size = target.tensor_parallel_size
        return LLM(
            target.model,
            ranks=None
            if size == 1
            else RankGroup(self._store, 0, size, device=choose_device(target.own_device)),
            speculative_config=settings.config.speculative_config(settings.addresses),
            **target.engine_settings,
        )
