"""Draft workers and targets on real sockets, for the tests of the transport."""

import queue
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from outrider.actors.grpc_client import DraftClient, GrpcDraftChannel
from outrider.actors.grpc_server import DraftServer, Peer
from outrider.actors.io_thread import IoThread
from outrider.actors.transport import Received
from outrider.actors.wire import METHOD, SERVICE
from outrider.speculation.replication.messages import Hello, TargetMessage, Welcome

SECONDS = 10.0
"""Far more than anything here takes."""
HELLO = Hello(
    protocol_version=1,
    model="target",
    vocab_hash="v-1",
    vocab_size=100,
    eos_ids=(1,),
    numerics="canonical",
)
WELCOME = Welcome(
    protocol_version=1,
    name="draft-0",
    model="draft",
    vocab_hash="v-1",
    vocab_size=100,
    numerics="canonical",
    max_model_len=64,
    max_sessions=4,
)

Handler = Callable[[Any, grpc.aio.ServicerContext[bytes, bytes]], Awaitable[None]]


class Recorder:
    """Hears of peers and notes what it hears."""

    def __init__(self) -> None:
        self.heard: queue.Queue[tuple[str, Peer, Any]] = queue.Queue()

    def joined(self, peer: Peer, hello: Hello) -> None:
        self.heard.put(("joined", peer, hello))

    def message(self, peer: Peer, message: TargetMessage, num_bytes: int) -> None:
        self.heard.put(("message", peer, (message, num_bytes)))

    def left(self, peer: Peer) -> None:
        self.heard.put(("left", peer, None))

    def next(self, kind: str) -> tuple[Peer, Any]:
        """The next thing heard, which must be a ``kind``."""
        heard, peer, detail = self.heard.get(timeout=SECONDS)
        assert heard == kind
        return peer, detail


@contextmanager
def serving(io: IoThread, events: Any = None, **options: Any) -> Iterator[DraftServer]:
    """A draft worker's server; see ``DraftServer`` for the options."""
    server = DraftServer(options.pop("welcome", WELCOME), events or Recorder(), **options)
    io.run(server.start(), SECONDS)
    try:
        yield server
    finally:
        io.run(server.stop(0), SECONDS)


@contextmanager
def impostor(io: IoThread, handler: Handler) -> Iterator[str]:
    """The address of a server that answers streams with ``handler``, whatever that is."""
    method = grpc.stream_stream_rpc_method_handler(handler)

    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {METHOD: method})])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = io.run(start(), SECONDS)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        io.run(server.stop(0), SECONDS)


@contextmanager
def connecting(io: IoThread, **options: Any) -> Iterator[DraftClient]:
    """A target's client; see ``DraftClient`` for the options."""
    client = DraftClient(io=io, **options)
    try:
        yield client
    finally:
        client.close()


def address_of(server: DraftServer) -> str:
    return f"127.0.0.1:{server.port}"


def events_until(client: DraftClient, channel: GrpcDraftChannel, kind: type) -> list[Received]:
    """Everything received up to the first event of a kind, which is the last of the list or near it."""
    events: list[Received] = []
    deadline = time.monotonic() + SECONDS
    while not any(isinstance(each.event, kind) for each in events):
        assert time.monotonic() < deadline, f"no {kind.__name__}, but {events}"
        client.wait(deadline - time.monotonic())
        events += channel.receive()
    return events


def next_event(client: DraftClient, channel: GrpcDraftChannel, kind: type) -> Any:
    """The first event of a kind."""
    events = events_until(client, channel, kind)
    return next(each.event for each in events if isinstance(each.event, kind))


def outcome(
    io: IoThread,
    address: str,
    *frames: bytes,
    kind: str = "stream_stream",
    method: str = f"/{SERVICE}/{METHOD}",
    metadata: tuple[tuple[str, str], ...] = (),
    credentials: grpc.ChannelCredentials | None = None,
) -> tuple[grpc.StatusCode, str]:
    """How a server ends a raw call of a kind that sends these frames, whatever it answered before."""

    async def call() -> tuple[grpc.StatusCode, str]:
        options = [("grpc.max_send_message_length", -1)]
        if credentials is None:
            opened = grpc.aio.insecure_channel(address, options)
        else:
            opened = grpc.aio.secure_channel(address, credentials, options)
        async with opened as channel:
            request = b"".join(frames) if kind.startswith("unary") else _each(frames)
            call = getattr(channel, kind)(method)(request, metadata=metadata, timeout=SECONDS)
            try:
                if kind.endswith("unary"):
                    await call
                else:
                    async for _ in call:
                        pass
            except grpc.aio.AioRpcError as error:
                return error.code(), error.details() or ""
            return await call.code(), await call.details()

    for _ in range(5):
        ended, told = io.run(call(), SECONDS)
        # Who is still sending may hear of the reset stream and not of the reason; here nothing ends so.
        if ended is not grpc.StatusCode.INTERNAL:
            break
    return ended, told


async def _each(frames: tuple[bytes, ...]) -> AsyncIterator[bytes]:
    for frame in frames:
        yield frame
