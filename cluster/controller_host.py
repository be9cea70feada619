"""The process of a cluster's controller."""

import asyncio
import time
from typing import Any

from outrider.actors.security import Security
from outrider.cluster.cluster_config import ClusterConfig
from outrider.cluster.component_logs import log_as
from outrider.cluster.controller import Controller


class ControllerHost:
    """Runs a ``Controller``; the actor's own loop is its loop."""

    def __init__(self, config: ClusterConfig, security: Security, host: str | None) -> None:
        self._arguments = config, security, host
        self._controller: Controller | None = None
        self._running: asyncio.Task[None] | None = None

    async def wait_ready(self, seconds: float) -> None:
        """Starts the cluster, the first time; see ``Controller.wait_ready``."""
        await self._started().wait_ready(seconds)

    async def targets(self) -> dict[str, Any]:
        """See ``Controller``."""
        return self._started().targets()

    async def targets_beside(self, known: dict[str, int]) -> dict[str, tuple[int, Any]]:
        """See ``Controller``."""
        return await self._started().targets_beside(known)

    async def status(self) -> list[dict[str, Any]]:
        """See ``Controller``."""
        return self._started().status()

    async def stop(self) -> None:
        """Ends all members; returns when they are gone."""
        self._started().stop()
        assert self._running is not None
        await self._running

    def _started(self) -> Controller:
        if self._controller is None:
            from outrider.cluster.ray_launcher import RayLauncher

            log_as("controller")
            config, security, host = self._arguments
            launcher = RayLauncher(config, security, host=host)
            self._controller = Controller(config, launcher, time.monotonic)
            self._running = asyncio.ensure_future(self._controller.run())
        return self._controller
