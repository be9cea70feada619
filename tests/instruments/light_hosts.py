"""A target's process without a target, for tests of where processes run and how they are replaced."""

import asyncio
from collections.abc import Sequence
from typing import Any

from outrider.cluster.hosts import Host


class LightHost(Host):
    """Loads nothing and serves nobody."""

    async def open_group(self) -> int:
        return 0

    async def start(self, settings: Any, *_: int) -> None:
        self.addresses = settings.addresses

    async def serve(self) -> None:
        await asyncio.Event().wait()

    async def draft_with(self, addresses: Sequence[str]) -> None:
        self.addresses = list(addresses)


class BrokenHost(Host):
    """Cannot even be made."""

    def __init__(self, node: str) -> None:
        raise RuntimeError(f"a library is missing on {node}")
