"""A cluster's targets behind the API: calls are spread over them, and go on elsewhere when one dies.

Asks of Ray what ``ray_client`` asks, but from an event loop.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Self

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from outrider.cluster.api.backend import Health, UnavailableError
from outrider.cluster.model_card import ModelCard
from outrider.cluster.resumption import Progress
from outrider.speculation.errors import OutriderError, TargetGroupError
from outrider.speculation.request import Completion, Request, StepEvent, StepOutput

log = logging.getLogger(__name__)

FAILOVER_SECONDS = 30.0
"""That a call waits for a target once its own is gone and there is no other."""
STATUS_SECONDS = 2.0
"""That a target, or the controller, has to say how it is doing."""
REST_SECONDS = 5.0
"""That a target is left out after a call to it failed, if the controller does not hear of its end."""
WATCH_PAUSE = 0.5
"""Seconds after which the controller is looked for again."""
Target = tuple[str, int]
"""Name and epoch."""


class RayBackend:
    """Implements ``Backend``; ``connect`` makes one.

    It hears from the controller which targets serve as soon as that changes, and leaves one out as soon
    as a call to it fails.
    """

    def __init__(self, find: Callable[[], Awaitable[ActorHandle[Any]]]) -> None:
        self.card: ModelCard
        self._find = find
        self._controller: ActorHandle[Any] | None = None
        self._targets: dict[Target, ActorHandle[Any]] = {}
        self._lost: set[Target] = set()
        """Those that failed before the controller knew."""
        self._calls: Counter[Target] = Counter()
        """Texts that each target is serving for this backend."""
        self._changed = asyncio.Event()
        """Set, and replaced, whenever there may be other usable targets."""
        self._watching = asyncio.ensure_future(self._watch())

    @classmethod
    async def connect(cls, find: Callable[[], Awaitable[ActorHandle[Any]]], seconds: float) -> Self:
        """Waits for a first target. find: gives the cluster's controller, and a new one when that is gone;
        it raises RayError or UnavailableError where there is none now.

        Raises:
            UnavailableError: there is none within ``seconds``.
        """
        backend = cls(find)
        _, target = await backend._pick(seconds)
        backend.card = await target.describe.remote()
        return backend

    @property
    def serving(self) -> int:
        """See ``Backend``."""
        return len(self._usable)

    async def stream(
        self, requests: Sequence[Request], interval: float
    ) -> AsyncGenerator[list[tuple[int, StepOutput | Completion]]]:
        """See ``Backend``.

        Raises:
            TargetLostError: one target after another ended with the call.
        """
        everything = [Progress(request) for request in requests]
        seconds = 0.0
        while left := [index for index, each in enumerate(everything) if not each.finished]:
            key, target = await self._pick(seconds)
            seconds = FAILOVER_SECONDS
            self._calls[key] += len(left)
            lots = _events(target, [everything[index] for index in left], interval)
            try:
                async with aclosing(lots):
                    async for events in lots:
                        yield [
                            (left[event.index], item)
                            for event in events
                            for item in everything[left[event.index]].take(event)
                        ]
            except RayTaskError:
                raise
            except (RayError, TargetGroupError) as error:
                self._leave_out(key)
                for index in left:
                    if (given_up := everything[index].lose()) is not None:
                        raise given_up from error
            finally:
                self._calls[key] -= len(left)

    async def health(self) -> Health:
        """See ``Backend``."""
        figures = await asyncio.gather(*map(_figures, self._usable.values()))
        answers = [each for each in figures if each is not None]
        members = [
            {"name": "controller", "role": "controller", "phase": "failed", "note": "it does not answer"}
        ]
        if self._controller is not None:
            with contextlib.suppress(RayActorError, TimeoutError):
                async with asyncio.timeout(STATUS_SECONDS):
                    members = await self._controller.status.remote()
        return Health(
            serving=self.serving,
            running=sum(each["running"] for each in answers),
            waiting=sum(each["waiting"] for each in answers),
            kv_cache_usage=max((each["kv_cache_usage"] for each in answers), default=0.0),
            drafters=max((each["drafters"] for each in answers), default=0),
            members=members,
        )

    async def close(self) -> None:
        """See ``Backend``; the cluster stays."""
        self._watching.cancel()

    async def _pick(self, seconds: float) -> tuple[Target, ActorHandle[Any]]:
        """The target with the fewest texts; waits if there is none."""
        try:
            async with asyncio.timeout(seconds):
                while not self._usable:
                    await self._changed.wait()
        except TimeoutError:
            raise UnavailableError("no target serves now") from None
        return min(self._usable.items(), key=lambda item: self._calls[item[0]])

    @property
    def _usable(self) -> dict[Target, ActorHandle[Any]]:
        return {key: handle for key, handle in self._targets.items() if key not in self._lost}

    def _leave_out(self, key: Target) -> None:
        """For a while: most often it is dead, and the controller will say so; else only the way there was."""
        self._lost.add(key)
        asyncio.get_running_loop().call_later(REST_SECONDS, self._take_back, key)

    def _take_back(self, key: Target) -> None:
        self._lost.discard(key)
        self._note_change()

    def _note_change(self) -> None:
        """Whoever waits for a target looks again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _watch(self) -> None:
        while True:
            try:
                await self._follow(await self._find())
            except (RayError, UnavailableError) as error:
                log.warning("the controller cannot be heard: %s", error)
            # Its end is that of its targets, too.
            self._targets, self._controller = {}, None
            await asyncio.sleep(WATCH_PAUSE)

    async def _follow(self, controller: ActorHandle[Any]) -> None:
        """
        Raises:
            RayError: the controller is gone or out of reach.
        """
        self._controller, known = controller, dict[str, int]()
        while True:
            targets = await controller.targets_beside.remote(known)
            known = {name: epoch for name, (epoch, _) in targets.items()}
            self._targets = {(name, epoch): handle for name, (epoch, handle) in targets.items()}
            self._note_change()


async def _events(
    target: ActorHandle[Any], items: Sequence[Progress], interval: float
) -> AsyncGenerator[list[StepEvent]]:
    """What a target does with the requests, from their beginning.

    Raises:
        RayActorError: it died.
        OutriderError: it refused or failed.
    """
    for item in items:
        item.restart()
    streaming: Any = target.generate.options(num_returns="streaming")
    stream = streaming.remote([item.request for item in items], interval)
    ended = False
    try:
        async for reference in stream:
            yield await reference
        ended = True
    except RayTaskError as error:
        ended = True
        if isinstance(error.cause, OutriderError):
            raise error.cause from None
        raise
    except RayActorError:
        ended = True
        raise
    finally:
        if not ended:
            with contextlib.suppress(RayError):
                ray.cancel(stream)


async def _figures(target: ActorHandle[Any]) -> dict[str, Any] | None:
    """None from one that does not answer."""
    try:
        async with asyncio.timeout(STATUS_SECONDS):
            figures: dict[str, Any] = await target.status.remote()
            return figures
    except (RayError, TimeoutError):
        return None
