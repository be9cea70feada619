"""Starts a cluster's members as Ray actors. All that a controller asks of Ray is in here."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from outrider.actors.security import Security
from outrider.cluster.cluster_config import ClusterConfig, DraftPoolConfig, Resources
from outrider.cluster.controller import Reports, is_lasting
from outrider.cluster.hosts import DraftHost, DraftSettings, RankHost, TargetHost, TargetSettings
from outrider.cluster.placement import Need
from outrider.cluster.supervisor import Role
from outrider.speculation.errors import OutriderError

GROUP_SECONDS = 3.0
WORKER_SECONDS = 30.0
"""After which it is said that there is no room; placing goes on. For a draft worker its process
must have started too."""
REMOVAL_SECONDS = 1.0
"""How long a group that is being placed is waited for before it is removed."""
LOAD_SECONDS = 1.0
"""Between two looks at what a draft worker has to do."""
_NOTHING = {"memory": 1.0}
"""A byte; Ray refuses empty bundles."""


class RayLauncher:
    """Implements ``Launcher``. A member's life is one task, which leaves nothing behind.

    host: for draft workers to listen on; None takes the node's own address.
    """

    def __init__(self, config: ClusterConfig, security: Security, *, host: str | None) -> None:
        self._config, self._security, self._host = config, security, host
        self._lives: dict[tuple[str, int], asyncio.Task[None]] = {}

    def launch(self, need: Need, role: Role, epoch: int, addresses: list[str], reports: Reports) -> None:
        """See ``Launcher``."""
        life = self._draft(need, reports) if role is Role.DRAFT else self._target(need, addresses, reports)
        task = asyncio.ensure_future(_reported(life, reports))
        self._lives[need.name, epoch] = task
        task.add_done_callback(lambda _: self._lives.pop((need.name, epoch), None))

    def discard(self, name: str, epoch: int) -> None:
        """See ``Launcher``."""
        life = self._lives.get((name, epoch))
        if life is not None:
            life.cancel()

    async def close(self) -> None:
        """See ``Launcher``."""
        await asyncio.gather(*self._lives.values(), return_exceptions=True)

    async def _draft(self, need: Need, reports: Reports) -> None:
        pool = need.each
        assert isinstance(pool, DraftPoolConfig)
        # Drafters are independent of each other: each goes where there is room, away from the others.
        where: dict[str, Any] = {"scheduling_strategy": "SPREAD", "label_selector": dict(pool.labels)}
        if pool.accelerator_type is not None:
            where["accelerator_type"] = pool.accelerator_type
        actor = _actor(DraftHost, pool).options(**where).remote()
        try:
            reports.placed([await _patiently(actor.place.remote(), WORKER_SECONDS, need, reports)])
            settings = DraftSettings(
                name=need.name,
                pool=pool,
                security=self._security,
                interface=self._config.network.interface,
                host=self._host,
            )
            address, model = await self._in_time(actor.start.remote(settings))
            reports.drafting(address, model)
            listening = asyncio.ensure_future(_report_sessions(actor, reports))
            try:
                await actor.serve.remote()
            finally:
                listening.cancel()
        finally:
            ray.kill(actor)

    async def _target(self, need: Need, addresses: list[str], reports: Reports) -> None:
        group = placement_group(
            [need.each.bundle or _NOTHING] * need.ranks,
            strategy="STRICT_PACK",
            bundle_label_selector=[dict(need.each.labels)] * need.ranks,
        )
        ranks: list[ActorHandle[Any]] = []
        try:
            if not await asyncio.to_thread(group.wait, GROUP_SECONDS):
                reports.unplaced(_waiting_line(need))
                await group.ready()
            ranks = [
                _actor(RankHost if index else TargetHost, need.each)
                .options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, index))
                .remote()
                for index in range(need.ranks)
            ]
            reports.placed(await asyncio.gather(*(rank.place.remote() for rank in ranks)))
            settings = TargetSettings(
                name=need.name, config=self._config, security=self._security, addresses=addresses
            )
            first, *others = ranks
            port = await first.open_group.remote() if others else 0
            starts = [rank.start.remote(settings, number, port) for number, rank in enumerate(others, 1)]
            await self._in_time(asyncio.gather(first.start.remote(settings), *starts))
            reports.serving(_RayTarget(ranks[0]))
            # One lost rank is the end of all: none of them can go on alone.
            await asyncio.gather(*(rank.serve.remote() for rank in ranks))
        finally:
            for rank in ranks:
                ray.kill(rank)
            # Ray loses the resources of a group that is removed in the moment of its placement
            # (ray-project/ray issue 64693); one without room has no such moment.
            await asyncio.to_thread(group.wait, REMOVAL_SECONDS)
            remove_placement_group(group)

    async def _in_time(self, started: Any) -> Any:
        seconds = self._config.limits.start_seconds
        try:
            return await asyncio.wait_for(started, seconds)
        except TimeoutError:
            raise TimeoutError(f"it did not start within {seconds:g} s") from None


class _RayTarget:
    """Implements ``controller.Target``."""

    def __init__(self, actor: ActorHandle[Any]) -> None:
        self.handle = actor

    def draft_with(self, addresses: list[str]) -> None:
        """See ``Target``."""
        self.handle.draft_with.remote(addresses)


async def _reported(life: Coroutine[Any, Any, None], reports: Reports) -> None:
    """Lives, and says how it ended unless it was discarded."""
    try:
        await life
        reports.ended("it ended by itself")
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        reports.ended(_line(cause), lasting=is_lasting(cause))
    except OutriderError as error:
        reports.ended(_line(error), lasting=is_lasting(error))
    except RayActorError as error:
        # Of what ended a process at its very start Ray shows the traceback; what counts comes last.
        reports.ended(f"its process died: {_line(error, -1 if error.actor_init_failed else 0)}")
    except Exception as error:  # whatever it is, the member must not look as if it were on its way
        reports.ended(_line(error))


async def _report_sessions(actor: ActorHandle[Any], reports: Reports) -> None:
    """Says how many requests a draft worker drafts for, as it changes, but not for every short one."""
    known = 0
    with contextlib.suppress(RayError):  # its end is told by ``serve``
        while True:
            known = await actor.sessions_beside.remote(known)
            reports.sessions(known)
            await asyncio.sleep(LOAD_SECONDS)


async def _patiently(placed: Any, seconds: float, need: Need, reports: Reports) -> Any:
    """Waits for a place as long as it takes; says so if it takes longer than ``seconds``."""
    done, _ = await asyncio.wait({waiting := asyncio.ensure_future(placed)}, timeout=seconds)
    if not done:
        reports.unplaced(_waiting_line(need))
    return await waiting


def _waiting_line(need: Need) -> str:
    wanted = ", ".join(f"{amount * need.ranks:g} {name}" for name, amount in need.each.bundle.items())
    labels = "".join(f", label {name}={value}" for name, value in need.each.labels.items())
    free = ", ".join(
        f"{amount:g} {name}"
        for name, amount in sorted(ray.available_resources().items())
        if name in need.each.bundle
    )
    return f"waits for {wanted}{labels} on one node; free in the whole cluster: {free or 'none of it'}"


def _actor(host: Callable[..., Any], takes: Resources) -> Any:
    """The class as an actor class that takes a process's share of a node."""
    # Whoever takes no GPU sees none; Ray would show it all of them.
    hidden = {} if takes.num_gpus else {"CUDA_VISIBLE_DEVICES": ""}
    options: dict[str, Any] = {
        "num_cpus": takes.num_cpus,
        "num_gpus": takes.num_gpus,
        "resources": dict(takes.resources),
        "runtime_env": {"env_vars": {"GRPC_VERBOSITY": "ERROR", **hidden}},
        "max_restarts": 0,
        "max_concurrency": 1000,
    }
    return ray.remote(**options)(_located(host))


def _located(host: Callable[..., Any]) -> type:
    """The class, told by Ray where it is."""

    class Located(host):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__(ray.util.get_node_ip_address())

    Located.__name__ = Located.__qualname__ = host.__name__  # what Ray shows people
    return Located


def _line(error: BaseException, number: int = 0) -> str:
    lines = str(error).strip().splitlines()
    return lines[number] if lines else type(error).__name__
