"""The API's way to a cluster's targets, with stand-ins for Ray's actors."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError, RayError

from outrider.cluster import ray_backend
from outrider.cluster.api.backend import UnavailableError
from outrider.cluster.ray_backend import RayBackend
from outrider.cluster.resumption import MOST_FAILOVERS
from outrider.speculation.errors import TargetLostError
from outrider.speculation.request import Completion, Request, StepEvent, StepOutput
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.statistics import SpeculationStatistics

REQUEST = Request(prompt_ids=np.array([1]), params=SamplingParams(max_tokens=2))
TOKENS = [5, 6]
SECONDS = 10.0


class Target:
    """Gives ``TOKENS``, one a step; the first ``failures`` calls to it fail after the first token."""

    def __init__(self, failures: int = 0) -> None:
        self.failures, self.calls = failures, 0
        self.generate = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._generate))

    async def _generate(
        self, requests: list[Request], interval: float
    ) -> AsyncIterator[Awaitable[list[StepEvent]]]:
        assert (requests, interval) == ([REQUEST], 0.0)
        self.calls += 1
        for token in TOKENS:
            yield _ready([StepEvent(index=0, output=_step(token))])
            if self.calls <= self.failures:
                raise RayActorError
        yield _ready([StepEvent(index=0, output=None, completion=_completion())])


class Controller:
    """Says once which targets there are."""

    def __init__(self, targets: dict[str, Target]) -> None:
        self._targets = targets
        self.targets_beside = SimpleNamespace(remote=self._beside)

    async def _beside(self, known: dict[str, int]) -> dict[str, tuple[int, Target]]:
        if known:
            await asyncio.Event().wait()
        return {name: (1, target) for name, target in self._targets.items()}


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Ray's own functions are called without Ray, they would start one."""

    def refused(*_: Any) -> None:
        pytest.fail("Ray was called")

    monkeypatch.setattr("ray.cancel", refused)


def _step(token: int) -> StepOutput:
    return StepOutput(token_ids=[token], num_accepted=0, text=chr(token))


def _completion() -> Completion:
    return Completion(
        index=0,
        text="".join(map(chr, TOKENS)),
        token_ids=TOKENS,
        finish_reason="length",
        stop_reason=None,
        stats=SpeculationStatistics(),
    )


async def _ready(events: list[StepEvent]) -> list[StepEvent]:
    return events


def _finding(controller: Controller) -> Callable[[], Awaitable[Any]]:
    async def find() -> Any:
        return controller

    return find


async def _tokens(backend: RayBackend) -> list[int]:
    lots = [lot async for lot in backend.stream([REQUEST], 0.0)]
    steps = [item for lot in lots for _, item in lot if isinstance(item, StepOutput)]
    return [token for step in steps for token in step.token_ids]


def _run(find: Callable[[], Awaitable[Any]]) -> list[int]:
    async def run() -> list[int]:
        backend = RayBackend(find)
        try:
            async with asyncio.timeout(SECONDS):
                await backend._pick(SECONDS)
                return await _tokens(backend)
        finally:
            await backend.close()

    return asyncio.run(run())


def test_the_only_target_is_asked_again_once_it_has_rested(monkeypatch: pytest.MonkeyPatch) -> None:
    # It was out of reach and did not die: the controller has nothing to say.
    monkeypatch.setattr(ray_backend, "REST_SECONDS", 0.05)
    target = Target(failures=1)
    assert _run(_finding(Controller({"target-0": target}))) == TOKENS
    assert target.calls == 2


def test_a_call_that_ends_every_target_is_given_up() -> None:
    targets = {f"target-{index}": Target(failures=9) for index in range(MOST_FAILOVERS + 3)}
    with pytest.raises(TargetLostError, match=f"{MOST_FAILOVERS + 1} targets died"):
        _run(_finding(Controller(targets)))
    assert sum(target.calls for target in targets.values()) == MOST_FAILOVERS + 1


@pytest.mark.parametrize("error", [RayActorError(), RayError("odd"), UnavailableError("no keeper")])
def test_a_controller_that_is_not_found_is_looked_for_again(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_backend, "WATCH_PAUSE", 0.01)
    errors, controller = [error], Controller({"target-0": Target()})

    async def find() -> Any:
        if errors:
            raise errors.pop()
        return controller

    assert _run(find) == TOKENS
