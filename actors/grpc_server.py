"""A draft worker's end of the wire: one stream for each target, and the health service."""

import asyncio
import ipaddress
from typing import Protocol

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_health.v1.health_pb2 import HealthCheckResponse

from outrider.actors.mailboxes import Outbox, first_of
from outrider.actors.security import Security, TokenInterceptor
from outrider.actors.wire import MAX_MESSAGE_BYTES, METHOD, SERVICE, decode_target, encode_drafter
from outrider.speculation.errors import InvalidConfigError, SlowPeerError, WireError
from outrider.speculation.replication.messages import DrafterMessage, Hello, TargetMessage, Welcome

MAX_STREAMS = 64
OUTBOX_BYTES = 4 << 20
HELLO_SECONDS = 2.0

_OTHER_CALLS = 64
"""Room for health checks beside the streams."""
_OPTIONS = (
    # Else a second worker on the same port would silently get half of the connections.
    ("grpc.so_reuseport", 0),
    # Targets ping every 500 ms; gRPC's default would take that for an attack.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 200),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # A target that hangs, or whose host vanished, must not keep its sessions.
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 3000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.server_handshake_timeout_ms", 2000),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
_Context = grpc.aio.ServicerContext[bytes, bytes]


class Peer:
    """One connected target; implements ``TargetPeer``.

    address: the target's end, for messages to people.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.outbox = Outbox(OUTBOX_BYTES)

    def send(self, message: DrafterMessage) -> None:
        """Encodes in the calling thread and never waits; see ``TargetPeer``."""
        self.outbox.put(encode_drafter(message))


class PeerEvents(Protocol):
    """Hears of targets and their messages, in the I/O loop: nothing here may block."""

    def joined(self, peer: Peer, hello: Hello) -> None:
        """A target has been welcomed."""
        ...

    def message(self, peer: Peer, message: TargetMessage, num_bytes: int) -> None:
        """It sent something; never a ``Hello``. num_bytes: on the wire."""
        ...

    def left(self, peer: Peer) -> None:
        """Its stream is over."""
        ...


class DraftServer:
    """Listens for targets; all of it runs in the loop that calls ``start``.

    welcome: the answer to every target that shares its protocol version and vocabulary.
    port: 0 takes a free one.

    Raises:
        InvalidConfigError: the host can be reached from elsewhere and there is no token, or
            the files of ``security`` are unusable.
    """

    def __init__(
        self,
        welcome: Welcome,
        events: PeerEvents,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        security: Security | None = None,
        max_streams: int = MAX_STREAMS,
    ) -> None:
        security = security or Security()
        require_token(host, security)
        self._welcome, self._events = welcome, events
        self._host, self._wanted_port, self._port = host, port, 0
        self._credentials = security.server_credentials()
        self._interceptors = [] if security.token is None else [TokenInterceptor(security.token)]
        self._max_streams = max_streams
        self._health = health.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._streams = 0
        self._draining = False

    @property
    def port(self) -> int:
        """Where it listens, once started."""
        return self._port

    async def start(self) -> None:
        """
        Raises:
            InvalidConfigError: the port is taken, or the host is not this machine's.
        """
        server = grpc.aio.server(
            interceptors=self._interceptors,
            options=_OPTIONS,
            maximum_concurrent_rpcs=self._max_streams + _OTHER_CALLS,
        )
        # Without serialisers gRPC hands over bytes, whose number is counted and whose decoding
        # is under this file's control.
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(self._replicate)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler})])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self._port = self._bind(server)
        await self._health.set(SERVICE, HealthCheckResponse.SERVING)
        await server.start()
        self._server = server

    async def drain(self) -> None:
        """Reports NOT_SERVING and takes no more targets; those that are connected stay."""
        self._draining = True
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: float) -> None:
        """Drains, and ends every stream that is still there after ``grace`` seconds."""
        await self.drain()
        if self._server is not None:
            await self._server.stop(grace)

    def _bind(self, server: grpc.aio.Server) -> int:
        host = f"[{self._host}]" if ":" in self._host else self._host
        address = f"{host}:{self._wanted_port}"
        try:
            if self._credentials is None:
                return server.add_insecure_port(address)
            return server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise InvalidConfigError(f"cannot listen on {address}; is the port taken?") from error

    async def _replicate(self, _requests: object, context: _Context) -> None:
        if self._draining:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this draft worker is shutting down")
        if self._streams >= self._max_streams:
            details = f"this draft worker serves {self._streams} targets already"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, details)
        self._streams += 1
        try:
            await self._serve(context)
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except SlowPeerError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except TimeoutError:
            details = f"no Hello came within {HELLO_SECONDS:g} s"
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, details)
        finally:
            self._streams -= 1

    async def _serve(self, context: _Context) -> None:
        async with asyncio.timeout(HELLO_SECONDS):
            data = await context.read()
        if not isinstance(data, bytes):  # the target has left again
            return
        hello = decode_target(data)
        if not isinstance(hello, Hello):
            raise WireError(f"the first message must be a Hello, not {type(hello).__name__}")
        await self._check(hello, context)
        await context.write(encode_drafter(self._welcome))
        peer = Peer(context.peer())
        self._events.joined(peer, hello)
        try:
            await first_of(self._read(peer, context), peer.outbox.write_to(context.write))
        finally:
            peer.outbox.close()
            self._events.left(peer)

    async def _check(self, hello: Hello, context: _Context) -> None:
        ours = self._welcome
        if hello.protocol_version != ours.protocol_version:
            theirs, mine = hello.protocol_version, ours.protocol_version
            details = f"the target speaks protocol version {theirs}, this draft worker {mine}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, details)
        if hello.vocab_hash != ours.vocab_hash:
            details = (
                f"the target's vocabulary is {hello.vocab_hash} ({hello.model}), "
                f"this draft worker's {ours.vocab_hash} ({ours.model})"
            )
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, details)

    async def _read(self, peer: Peer, context: _Context) -> None:
        while isinstance(data := await context.read(), bytes):
            message = decode_target(data)
            if isinstance(message, Hello):
                raise WireError("a Hello must be the first message of a stream, not a later one")
            self._events.message(peer, message, len(data))


def require_token(host: str, security: Security) -> None:
    """
    Raises:
        InvalidConfigError: the host can be reached from elsewhere and there is no token.
    """
    if security.token is None and not _is_loopback(host):
        raise InvalidConfigError(f"listening on {host}, beyond this machine, needs a cluster token")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
