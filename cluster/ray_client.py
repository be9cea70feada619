"""How a program talks to a cluster's controller and targets. All that it asks of Ray is in here."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray import ObjectRefGenerator
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from outrider.actors.security import Security
from outrider.cluster.cluster_config import ClusterConfig
from outrider.cluster.controller_host import ControllerHost
from outrider.cluster.generation import Prompt
from outrider.cluster.model_card import ModelCard
from outrider.cluster.placement import Node, needs_of, plan
from outrider.cluster.ray_runtime import NAMESPACE
from outrider.cluster.resumption import Progress
from outrider.speculation.errors import ClusterError, OutriderError, TargetGroupError, TargetLostError
from outrider.speculation.request import Request, StepEvent
from outrider.speculation.sampling_params import SamplingParams

STOP_SECONDS = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """Requests that a target was given together."""

    target: str
    items: list[Progress]


class Calls:
    """The calls in flight, and what they bring. interval: see ``TargetHost.generate``."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._calls: dict[ObjectRefGenerator, Call] = {}

    @property
    def open(self) -> bool:
        """Whether anything is to come."""
        return bool(self._calls)

    def unfinished(self, target: str) -> int:
        """Requests that a target has."""
        mine = (call for call in self._calls.values() if call.target == target)
        return sum(not item.finished for call in mine for item in call.items)

    def start(self, name: str, target: ActorHandle[Any], items: list[Progress]) -> None:
        """Gives a target requests."""
        for item in items:
            item.restart()
        requests = [item.request for item in items]
        streaming: Any = target.generate.options(num_returns="streaming")
        stream: ObjectRefGenerator = streaming.remote(requests, self._interval)
        self._calls[stream] = Call(name, items)

    def next(self) -> tuple[Call, list[StepEvent] | None]:
        """Waits for the next events of any call; None if its target died.

        Raises:
            OutriderError: the target refused or failed.
        """
        ready, _ = ray.wait(list(self._calls), num_returns=1, fetch_local=False)
        stream = cast(ObjectRefGenerator, ready[0])
        call = self._calls[stream]
        try:
            events: list[StepEvent] = _get(next(stream))
        except StopIteration:
            del self._calls[stream]
            return call, []
        except (RayActorError, TargetGroupError):
            return call, None
        return call, events

    def drop(self, target: str) -> list[Call]:
        """Forgets the calls of a target."""
        gone = [stream for stream, call in self._calls.items() if call.target == target]
        return [self._calls.pop(stream) for stream in gone]

    def close(self) -> None:
        """Cancels what is in flight."""
        for stream in self._calls:
            with contextlib.suppress(RayError):
                ray.cancel(stream)
        self._calls.clear()


class RayController:
    """A cluster's controller, wherever it runs."""

    def __init__(self, actor: ActorHandle[Any]) -> None:
        self.actor = actor

    def wait_ready(self, seconds: float) -> None:
        """Until every member serves.

        Raises:
            WorkerError: one does not.
        """
        _of_controller(self.actor.wait_ready.remote(seconds))

    def targets(self) -> dict[str, ActorHandle[Any]]:
        """The targets that serve, by name."""
        targets: dict[str, ActorHandle[Any]] = _of_controller(self.actor.targets.remote())
        return targets

    def status(self) -> list[dict[str, Any]]:
        """A row per member; see ``Controller.status``."""
        rows: list[dict[str, Any]] = _of_controller(self.actor.status.remote())
        return rows

    def target_status(self, target: ActorHandle[Any]) -> dict[str, Any]:
        """See ``TargetHost.status``."""
        figures: dict[str, Any] = _get(target.status.remote())
        return figures

    def prepare(
        self,
        target: ActorHandle[Any],
        prompt: Prompt,
        params: SamplingParams,
        speculative: bool,
        pipeline: str | None,
    ) -> tuple[str, list[Request]]:
        """See ``TextGenerator.prepare``.

        Raises:
            TargetLostError: the target is gone.
        """
        prepared: tuple[str, list[Request]] = _of_target(
            target.prepare.remote(prompt, params, speculative, pipeline)
        )
        return prepared

    def describe(self, target: ActorHandle[Any]) -> ModelCard:
        """See ``TextGenerator.describe``.

        Raises:
            TargetLostError: the target is gone.
        """
        card: ModelCard = _of_target(target.describe.remote())
        return card

    @contextmanager
    def calls(self, interval: float) -> Iterator[Calls]:
        """Calls that end with the block."""
        calls = Calls(interval)
        try:
            yield calls
        finally:
            calls.close()

    def shut_down(self) -> None:
        """Ends the cluster's processes, and waits until they are gone."""
        with contextlib.suppress(RayError):
            ray.get(self.actor.stop.remote(), timeout=STOP_SECONDS)
        ray.kill(self.actor)


def start_controller(
    config: ClusterConfig, security: Security, *, host: str | None, detached: bool
) -> RayController:
    """A new cluster's, on the Ray that this process is connected to.

    host: for draft workers to listen on; None takes each node's own address.
    detached: whether it outlives this process.

    Raises:
        ClusterError: a cluster of that name is up, or there is no room for this one.
    """
    require_room(config)
    options: dict[str, Any] = {
        "name": controller_name(config.name),
        "namespace": NAMESPACE,
        "num_cpus": 0,
        # Nothing survives the head; on another node the cluster would end with that one, too.
        "resources": {"node:__internal_head__": 0.001},
        "max_concurrency": 1000,
    }
    if detached:
        options["lifetime"] = "detached"
    actor_class: Any = ray.remote(ControllerHost).options(**options)
    try:
        actor = actor_class.remote(config, security, host)
    except ValueError:
        raise ClusterError(
            f"a cluster called {config.name!r} is up already; 'outrider down' ends it, "
            "or give this one another name"
        ) from None
    return RayController(actor)


def find_controller(name: str) -> RayController | None:
    """The standing cluster of that name, if there is one."""
    try:
        return RayController(ray.get_actor(controller_name(name), namespace=NAMESPACE))
    except ValueError:
        return None


def controller_name(name: str) -> str:
    """Of the actor; actors of one namespace have different names."""
    return f"outrider-{name}"


def nodes() -> dict[str, Node]:
    """The nodes of the Ray cluster that are alive, by their ids."""
    return {
        node["NodeID"]: Node(
            name=f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
            resources=node["Resources"],
            labels=node.get("Labels") or {},
        )
        for node in ray.nodes()
        if node["Alive"]
    }


def require_room(config: ClusterConfig) -> None:
    """
    Raises:
        ClusterError: the nodes together do not offer what the cluster takes, even if they were idle.
    """
    problems = plan(needs_of(config), nodes().values()).problems
    if problems:
        raise ClusterError("; ".join(problems))


def _get(reference: Any) -> Any:
    """The result, or the very exception that was raised over there."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, OutriderError):
            raise error.cause from None
        raise


def _of_target(reference: Any) -> Any:
    """What a target answers.

    Raises:
        TargetLostError: it is gone.
    """
    try:
        return _get(reference)
    except RayActorError:
        raise TargetLostError("the target died before it was asked") from None


def _of_controller(reference: Any) -> Any:
    """What the controller answers.

    Raises:
        ClusterError: it is gone, and the cluster with it.
    """
    try:
        return _get(reference)
    except RayActorError:
        raise ClusterError(
            "the cluster's controller is gone, and its targets and draft workers with it: "
            "'outrider down' and 'outrider up' bring a standing cluster back"
        ) from None
