"""The HTTP API on a socket of this machine, in a thread of the test's process, and its raw answers."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from outrider import LLM
from outrider.cluster.api.app import build_app
from outrider.cluster.api.backend import Backend, Health
from outrider.cluster.api.local_backend import LocalBackend
from outrider.cluster.api.service import ModelSettings, ServedModel, Service
from outrider.cluster.model_card import ModelCard
from outrider.speculation.request import Completion, Request, StepOutput
from outrider.speculation.statistics import SpeculationStatistics
from outrider.speculation.types import FinishReason

SECONDS = 60.0
"""Far more than anything here takes, also on a busy machine."""
NAMES = ("tiny", "alias")

Lot = list[tuple[int, StepOutput | Completion]]


@dataclass(frozen=True)
class LiveServer:
    """A server that answers."""

    address: tuple[str, int]
    client: httpx.Client
    service: Service

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}"

    def post(self, path: str, body: dict[str, Any] | bytes) -> httpx.Response:
        """JSON, or bytes that are said to be JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.post(path, content=content, headers={"content-type": "application/json"})

    def json(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A reply that is no error."""
        reply = self.post(path, body)
        assert reply.status_code == 200, reply.text
        parsed: dict[str, Any] = reply.json()
        return parsed

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """A stream's, to its end."""
        reply = self.post(path, {**body, "stream": True})
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"].startswith("text/event-stream")
        return events_of(reply.text)

    def raw(self, request: bytes) -> tuple[int, bytes]:
        """Status and answer to bytes that no client would send; they ask for the connection's end."""
        with socket.create_connection(self.address, timeout=SECONDS) as connection:
            connection.sendall(request)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        return int(answer.split(b" ", 2)[1]), answer

    def status(self) -> dict[str, Any]:
        """Of the only model."""
        (row,) = self.client.get("/status").json()["models"]
        return dict(row)


def events_of(text: str) -> list[dict[str, Any]]:
    """Server-sent events, which end as OpenAI's do."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@contextmanager
def api_server(
    backend: Callable[[], Backend],
    *,
    keys: Sequence[str] = (),
    max_body: int = 200_000,
    names: Sequence[tuple[str, ...]] = (NAMES,),
    end: Callable[[], None] = lambda: None,
    **settings: Any,
) -> Iterator[LiveServer]:
    """Serves for the length of the block. backend: makes it, on the server's event loop, for each model.
    names: each model's. end: after all.
    """
    services: list[Service] = []

    async def make() -> Service:
        models = [ServedModel(backend(), ModelSettings(names=each, **settings)) for each in names]
        services.append(Service(models))
        return services[0]

    config = uvicorn.Config(build_app(make, keys=keys, max_body=max_body), log_config=None, access_log=False)
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    host, port = listener.getsockname()
    try:
        with httpx.Client(base_url=f"http://{host}:{port}", timeout=SECONDS) as client:
            # The listener takes connections already, so the first answer comes when the server has started.
            client.get("/health")
            yield LiveServer((host, port), client, services[0])
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        end()
        assert not thread.is_alive()


class KeptModel(LocalBackend):
    """A target that outlives its server."""

    async def close(self) -> None:
        """Ends the engine's thread alone."""
        await asyncio.to_thread(self._service._engine.close)


class ScriptedBackend:
    """Implements ``Backend`` with what a test wants to happen; the tokens are always the same."""

    def __init__(self, llm: LLM, *, serving: int = 1) -> None:
        self.card = ModelCard.of(llm)
        self.serving = serving
        self.lots: list[Lot] = []
        self.error: BaseException | None = None
        self.seen: list[Request] = []
        self.stats = SpeculationStatistics()
        """Of every completion."""
        self.left = 0
        """Calls that the caller closed before they were finished."""
        self._loop, self._release = asyncio.get_running_loop(), asyncio.Event()
        self._release.set()

    def hold(self) -> None:
        """From now on calls wait after their lots, until ``let_go``."""
        self._loop.call_soon_threadsafe(self._release.clear)

    def let_go(self) -> None:
        """Calls go on."""
        self._loop.call_soon_threadsafe(self._release.set)

    async def stream(self, requests: Sequence[Request], interval: float) -> AsyncGenerator[Lot]:  # noqa: ARG002
        """A token for each request, the lots, the error; else everybody's completion."""
        self.seen += requests
        try:
            yield [(index, step()) for index in range(len(requests))]
            for lot in self.lots:
                yield lot
            await self._release.wait()
            if self.error is not None:
                raise self.error
        except (GeneratorExit, asyncio.CancelledError):
            self.left += 1
            raise
        yield [(index, completion(request, self.stats)) for index, request in enumerate(requests)]

    async def health(self) -> Health:
        """See ``Backend``."""
        return Health(serving=self.serving, running=0, waiting=0, kv_cache_usage=0.0, drafters=0, members=[])

    async def close(self) -> None:
        """See ``Backend``."""


def step() -> StepOutput:
    """One token's."""
    return StepOutput(token_ids=[5], num_accepted=0, text="x")


def completion(request: Request, stats: SpeculationStatistics) -> Completion:
    """After one token."""
    return Completion(
        index=request.choice,
        text="x",
        token_ids=[5],
        finish_reason=FinishReason.LENGTH,
        stop_reason=None,
        stats=stats,
    )
