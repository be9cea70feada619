"""The API on Ray Serve: an ingress in front of clusters' targets.

``build_openai_app`` is an ``import_path`` for Serve's configuration files. Targets and draft workers are no
Serve replicas but members of an Outrider cluster (``controller``): a stream through Serve ends with its
replica, while a cluster's requests go on at another target with the same tokens, and drafters see gRPC only.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException

from outrider.cluster.api.app import build_app
from outrider.cluster.api.backend import UnavailableError
from outrider.cluster.api.guards import App
from outrider.cluster.api.service import ModelSettings, ServedModel, Service
from outrider.cluster.api_keys import api_keys
from outrider.cluster.cluster_config import ClusterConfig
from outrider.cluster.component_logs import log_as
from outrider.cluster.ray_backend import RayBackend
from outrider.cluster.ray_client import RayController, find_controller, start_controller
from outrider.cluster.ray_metrics import ray_instrument
from outrider.cluster.serve_config import OpenAIAppConfig
from outrider.cluster.standing import LOOPBACK, cluster_security_of
from outrider.speculation.errors import ClusterError

Model = tuple[ClusterConfig, ModelSettings]

NO_LIMIT = 100_000
DRAIN_SECONDS = 15.0
"""That streams under way have to end when the application is to end; Serve itself waits for 20."""


class ClusterKeeper:
    """Keeps one cluster: the standing one of its name, or one that ends with this replica."""

    # Serve awaits it; mypy knows only constructors that nobody awaits.
    async def __init__(self, config: ClusterConfig) -> None:  # type: ignore[misc]
        found = await asyncio.to_thread(find_controller, config.name)
        self._owned = found is None
        """Whether the cluster ends with this replica."""
        self._controller: RayController = (
            await asyncio.to_thread(_started, config) if found is None else found
        )

    async def controller(self) -> ActorHandle[Any]:
        """The cluster's controller."""
        return self._controller.actor

    async def __del__(self) -> None:
        """Serve calls it once the application is to end: streams that are under way may end before it."""
        if not self._owned:
            return
        targets = (await self._controller.actor.targets.remote()).values()
        with contextlib.suppress(TimeoutError, RayError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await asyncio.gather(*(target.idle.remote() for target in targets))
        await self._controller.actor.stop.remote()

    async def check_health(self) -> None:
        """Raises when the controller is gone, so that Serve starts a replica with a new one."""
        await self._controller.actor.status.remote()


def build_openai_app(args: Mapping[str, Any]) -> Application:
    """A Serve application with OpenAI's routes; see ``OpenAIAppConfig`` for what it may be given.

    Raises:
        InvalidConfigError: a setting is not possible.
    """
    config = OpenAIAppConfig.parse(args)
    return _application(
        config.models(),
        # The keys are read where they are needed: this configuration is shown to people.
        keys=partial(api_keys, (), config.api_key_file),
        max_body=config.max_body_size,
        num_replicas=config.num_replicas,
    )


@contextmanager
def served(model: Model, *, host: str, port: int, keys: Sequence[str], max_body: int) -> Iterator[None]:
    """A cluster behind the API for the length of the block, on the Ray that this process is connected to.

    Raises:
        ClusterError: the application does not start, or Serve runs already and listens elsewhere.
    """
    _require_address(host, port)
    name = f"outrider-{model[0].name}"
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    application = _application([model], keys=partial(list, keys), max_body=max_body, num_replicas=1)
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host=host, port=port))
    try:
        try:
            serve.run(application, name=name, route_prefix="/")
        except (RuntimeError, RayError, RayServeException) as error:
            raise ClusterError(f"the server does not start: {_reason(name, error)}") from error
        yield
    finally:
        serve.delete(name)


def _require_address(host: str, port: int) -> None:
    """A Serve that runs already keeps its address, and tells nobody but the log."""
    running = _get_global_client(raise_if_no_controller_running=False)
    if running is None:
        return
    options: HTTPOptions = running.http_config
    if (options.host, options.port) != (host, port):
        raise ClusterError(
            f"Ray Serve already runs on this Ray, at {options.host}, port {options.port}, "
            f"and cannot listen at {host}, port {port}; give that address, or end it with 'serve shutdown'"
        )


def _reason(name: str, error: Exception) -> str:
    """What Serve noted last of a deployment that failed; it tells its callers only which one."""
    application = serve.status().applications.get(name)
    messages = [] if application is None else [each.message for each in application.deployments.values()]
    lines = [message.strip().splitlines()[-1] for message in messages if message.strip()]
    return "; ".join(lines) or " ".join(str(error).split())


def _application(
    models: Sequence[Model], *, keys: Callable[[], Sequence[str]], max_body: int, num_replicas: int
) -> Application:
    keepers = [
        _deployment(ClusterKeeper, _keeper(config), num_replicas=1).bind(config) for config, _ in models
    ]

    def ingress() -> App:
        return build_app(partial(_service, models), keys=keys(), max_body=max_body)

    # Requests wait in the server's own queue, which answers at once where it is full.
    options = {"num_replicas": num_replicas, "max_ongoing_requests": NO_LIMIT}
    application: Application = _deployment(serve.ingress(ingress)(), "ingress", **options).bind(*keepers)
    return application


def _deployment(callee: Any, name: str, **options: Any) -> Any:
    """Of Serve; it takes no CPU, for what computes are the cluster's own members."""
    deployment: Any = serve.deployment(callee)
    return deployment.options(name=name, ray_actor_options={"num_cpus": 0}, **options)


async def _service(models: Sequence[Model]) -> Service:
    """In a replica of the ingress."""
    log_as("ingress")
    name = serve.get_replica_context().app_name
    served = []
    for config, settings in models:
        keeper = serve.get_deployment_handle(_keeper(config), name)

        async def find(keeper: Any = keeper) -> ActorHandle[Any]:
            try:
                actor: ActorHandle[Any] = await keeper.controller.remote()
            except RayServeException as error:
                raise UnavailableError(f"the cluster's keeper does not answer: {error}") from error
            return actor

        served.append(ServedModel(await RayBackend.connect(find, config.limits.start_seconds), settings))
    return Service(served, ray_instrument)


def _keeper(config: ClusterConfig) -> str:
    return f"cluster-{config.name}"


def _started(config: ClusterConfig) -> RayController:
    host = LOOPBACK if config.address == "local" and config.network.interface is None else None
    controller = start_controller(config, cluster_security_of(config), host=host, detached=False)
    controller.wait_ready(config.limits.start_seconds)
    return controller
