"""Runs the API in this process, on uvicorn."""

import asyncio
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import uvicorn
from uvicorn.loops.auto import auto_loop_factory
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from outrider.cluster.api.app import build_app
from outrider.cluster.api.service import Service
from outrider.speculation.errors import InvalidConfigError, TargetGroupError

Make: TypeAlias = Callable[[], Awaitable[tuple[Service, Awaitable[None]]]]
"""What is served, and what ends only when it fails for good, with why."""
MAX_HEAD = 64 << 10
"""Bytes of a request's address and headers."""
KEEP_ALIVE_SECONDS = 75
DRAIN_SECONDS = 20
"""That requests in flight have to end once the server is told to stop."""


def listening_socket(host: str, port: int) -> socket.socket:
    """Taken before anything is loaded, so that a taken port is known at once.

    Raises:
        InvalidConfigError: nobody can listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Only where the protocol is named does asyncio switch Nagle's algorithm off, which would hold a first
    # token for 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # Two that are bound and do not listen yet can have the same port.
        listener.listen()
    except (OSError, UnicodeError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidConfigError(f"cannot listen at {host}, port {port}: {reason}") from None
    return listener


def serve(
    listener: socket.socket,
    make: Make,
    *,
    keys: list[str],
    max_body: int,
    ready: Callable[[], None],
) -> None:
    """Serves until SIGINT or SIGTERM, then lets requests in flight end; a second signal does not wait.

    ready: called once requests are taken.

    Raises:
        OutriderError: what ``make`` raised.
        TargetGroupError: the engine failed; whoever started the server can start it again.
    """
    # uvloop, where it is there: it takes less of the time that the engine's thread shares.
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        runner.run(_serve(listener, make, keys, max_body, ready))


async def _serve(
    listener: socket.socket,
    make: Make,
    keys: list[str],
    max_body: int,
    ready: Callable[[], None],
) -> None:
    # Here, and not in the server's own start, where an error would be a traceback in its log.
    service, failure = await make()

    async def made() -> Service:
        return service

    config = uvicorn.Config(
        build_app(made, keys=keys, max_body=max_body),
        http=_Protocol,
        ws="none",
        access_log=False,
        # Longer than clients keep connections: one that both sides give up at once loses a request.
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        log_config=None,
        log_level=logging.WARNING,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    server = _Server(config, ready)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.handle_exit, number, None)
    serving, failing = asyncio.ensure_future(server.serve(sockets=[listener])), asyncio.ensure_future(failure)
    await asyncio.wait((serving, failing), return_when=asyncio.FIRST_COMPLETED)
    # Whoever is being served when the engine fails still hears of it.
    server.should_exit = True
    await serving
    if not failing.done():
        failing.cancel()
    elif (error := failing.exception()) is not None:
        raise TargetGroupError(f"the engine ended: {error}") from error


class _Protocol(HttpToolsProtocol):
    """HTTP whose heads have a limit, for they are read before anybody is asked for a key."""

    def on_message_begin(self) -> None:
        self._head = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._head += size
        if self._head > MAX_HEAD:
            # The parser's caller makes a 400 of it and closes the connection.
            raise ValueError(f"the request's head has more than {MAX_HEAD} bytes")


class _Server(uvicorn.Server):
    """One whose end by a signal is an end in order."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The loop has its handlers; uvicorn's would raise the signal once more at the end."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._ready()
