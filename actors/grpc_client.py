"""A target's end of the wire: streams to draft workers that come back by themselves."""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from outrider.actors.io_thread import IoThread, SharedIo
from outrider.actors.mailboxes import Bell, Inbox, Outbox, first_of
from outrider.actors.security import Security
from outrider.actors.transport import Received
from outrider.actors.wire import MAX_MESSAGE_BYTES, METHOD, SERVICE, decode_drafter, encode_target
from outrider.actors.wire_checks import one_line
from outrider.speculation.errors import OutriderError, SlowPeerError, WireError
from outrider.speculation.replication.messages import Hello, TargetMessage, Welcome

CONNECT_SECONDS = 2.0
HANDSHAKE_SECONDS = 2.0
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 2.0
REFUSED_PAUSE = 5.0
"""Before asking again a worker that said what only people can mend."""
STABLE_SECONDS = 2.0
"""A stream that lasted so long starts the pauses anew; hostile workers fail sooner."""
INBOX_MESSAGES = 4096
INBOX_BYTES = 4 << 20
OUTBOX_BYTES = 16 << 20

_OPTIONS = (
    # A worker whose host vanished is noticed within a second: TCP drops what is not acknowledged
    # in time. One that hangs acknowledges for ever; only the ping's own timeout finds it. Nobody
    # waits for that, a generation that is silent is given up long before; and a machine that pauses
    # for some seconds, as virtual ones do, should find its workers where they were.
    ("grpc.keepalive_time_ms", 500),
    ("grpc.keepalive_timeout_ms", 500),
    ("grpc.http2.ping_timeout_ms", 3000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Else a new channel would share the old one's connection, and its backoff.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
_LASTING = frozenset(
    {
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
_MASKED = "Internal error from Core"
"""What grpc.aio makes of a write that meets the end of a stream; the worker's own status is lost."""
_Call = grpc.aio.StreamStreamCall[bytes, bytes]


class _RefusedError(OutriderError):
    """The worker is not one for this target."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a stream ended. lasting: trying again at once would not help."""

    reason: str
    lasting: bool = False


class GrpcDraftChannel:
    """Implements ``DraftChannel``; made by ``DraftClient.connect``, used by one thread.

    bytes_sent, messages_sent, bytes_received, messages_received: over all connections,
        without ``Hello`` but with ``Welcome``, and with what an overflow threw away.
    """

    def __init__(
        self,
        address: str,
        hello: Hello,
        security: Security,
        *,
        io: IoThread,
        bell: Bell,
        over: Callable[[], None],
    ) -> None:
        self.address = address
        self.bytes_sent = self.bytes_received = 0
        self.messages_sent = self.messages_received = 0
        self._hello = encode_target(hello)
        self._expected = hello
        self._metadata = security.metadata
        self._credentials = security.channel_credentials()
        self._io = io
        self._over = over
        self._inbox = Inbox(bell, max_messages=INBOX_MESSAGES, max_bytes=INBOX_BYTES)
        self._outbox: Outbox | None = None
        """Of the stream whose ``Welcome`` was received last: nothing meant for it reaches the next."""
        self._welcomed_at: float | None = None
        self._task: asyncio.Task[None] | None = io.run(self._start())

    def send(self, message: TargetMessage) -> int:
        """Encodes in the calling thread and never waits; see ``DraftChannel``."""
        if self._outbox is None:
            return 0
        data = encode_target(message)
        if not self._outbox.put(data):
            return 0
        self.messages_sent += 1
        self.bytes_sent += len(data)
        return len(data)

    def receive(self) -> list[Received]:
        """See ``DraftChannel``."""
        arrived = self._inbox.take()
        self._outbox = self._inbox.outbox
        return arrived

    def close(self) -> None:
        """Ends the stream for good and waits until it is gone; may be called twice."""
        self._outbox = None
        self._inbox.close()
        # Also forgotten: it holds its cancellation's traceback, and with it gRPC's sockets.
        task, self._task = self._task, None
        if task is not None and not task.done():
            self._io.run(_stop(task))
        self._over()

    async def _start(self) -> asyncio.Task[None]:
        return asyncio.create_task(self._stay_connected())

    async def _stay_connected(self) -> None:
        pause, told = FIRST_PAUSE, ""
        while True:
            failure, seconds = await self._one_connection()
            # Once per outage, but also when its reason becomes one that people must hear of.
            if seconds is not None or not told or (failure.lasting and failure.reason != told):
                self._inbox.lose(failure.reason, lasting=failure.lasting)
                told = failure.reason
            if seconds is not None and seconds >= STABLE_SECONDS:
                pause = FIRST_PAUSE
            # Jitter keeps many targets from knocking at a restarted worker all at once.
            await asyncio.sleep(REFUSED_PAUSE if failure.lasting else pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _one_connection(self) -> tuple[_Failure, float | None]:
        """Why it ended, and how long it lasted after its ``Welcome``, if there was one."""
        loop = asyncio.get_running_loop()
        self._welcomed_at = None
        # A channel per connection: gRPC's own reconnecting has pauses of its own.
        channel = self._make_channel()
        try:
            failure = await self._outcome(channel)
        finally:
            await channel.close()
        return failure, None if self._welcomed_at is None else loop.time() - self._welcomed_at

    async def _outcome(self, channel: grpc.aio.Channel) -> _Failure:
        try:
            await self._converse(channel)
            return _Failure("the draft worker ended the stream")
        except grpc.aio.AioRpcError as error:
            if error.details() == _MASKED:
                return _Failure("the draft worker ended the stream while it was written to")
            reason = one_line(f"{error.code().name}: {error.details()}")
            return _Failure(reason, lasting=error.code() in _LASTING)
        except _RefusedError as error:
            return _Failure(one_line(str(error)), lasting=True)
        except WireError as error:
            return _Failure(one_line(f"the draft worker broke the protocol: {error}"))
        except SlowPeerError as error:
            return _Failure(f"the draft worker reads too slowly: {error}")
        except TimeoutError:
            return _Failure("the draft worker did not answer in time")
        except asyncio.CancelledError:
            # gRPC raises this also for a stream that the worker has cancelled.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return _Failure("the draft worker cancelled the stream")
        except Exception as error:  # whatever it was: a channel whose task died would be silent for ever
            return _Failure(one_line(f"{type(error).__name__}: {error}"))

    def _make_channel(self) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(self.address, _OPTIONS)
        return grpc.aio.secure_channel(self.address, self._credentials, _OPTIONS)

    async def _converse(self, channel: grpc.aio.Channel) -> None:
        call: _Call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(metadata=self._metadata)
        async with asyncio.timeout(CONNECT_SECONDS):
            await call.wait_for_connection()
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            await call.write(self._hello)
            data = await call.read()
        if not isinstance(data, bytes):
            return
        welcome = self._checked(data)
        outbox = Outbox(OUTBOX_BYTES)
        self._welcomed_at = asyncio.get_running_loop().time()
        self._count(data)
        self._inbox.put(Received(welcome, len(data)), outbox)
        try:
            await first_of(self._read(call), outbox.write_to(lambda data: _write(call, data)))
        finally:
            outbox.close()

    def _checked(self, data: bytes) -> Welcome:
        welcome, ours = decode_drafter(data), self._expected
        if not isinstance(welcome, Welcome):
            raise WireError(f"the first message must be a Welcome, not {type(welcome).__name__}")
        if welcome.protocol_version != ours.protocol_version:
            theirs, mine = welcome.protocol_version, ours.protocol_version
            raise _RefusedError(f"the draft worker speaks protocol version {theirs}, the target {mine}")
        if welcome.vocab_hash != ours.vocab_hash:
            raise _RefusedError(
                f"the draft worker's vocabulary is {welcome.vocab_hash} ({welcome.model}), "
                f"the target's {ours.vocab_hash} ({ours.model})"
            )
        return welcome

    async def _read(self, call: _Call) -> None:
        while isinstance(data := await call.read(), bytes):
            self._count(data)
            if not self._inbox.has_room(len(data)):
                continue
            message = decode_drafter(data)
            if isinstance(message, Welcome):
                raise WireError("a Welcome must be the first message of a stream, not a later one")
            self._inbox.put(Received(message, len(data), time.perf_counter()))

    def _count(self, data: bytes) -> None:
        self.messages_received += 1
        self.bytes_received += len(data)


class DraftClient:
    """All draft workers of one process; implements ``Arrivals`` over their channels.

    io: where the network's work is done; without one, a thread that all targets of the process share.

    Raises:
        InvalidConfigError: the files of ``security`` are unusable.
    """

    def __init__(self, *, security: Security | None = None, io: IoThread | None = None) -> None:
        self._security = security or Security()
        self._security.channel_credentials()
        self._shares_io = io is None
        self._io = io or SharedIo.acquire()
        self._bell = Bell()
        self._channels: set[GrpcDraftChannel] = set()

    def connect(self, address: str, hello: Hello) -> GrpcDraftChannel:
        """A channel to the worker at ``address`` (host:port), which need not be there yet."""
        channel = GrpcDraftChannel(
            address,
            hello,
            self._security,
            io=self._io,
            bell=self._bell,
            over=lambda: self._channels.discard(channel),
        )
        self._channels.add(channel)
        return channel

    def wait(self, seconds: float) -> None:
        """See ``Arrivals``."""
        self._bell.wait(seconds)

    def close(self) -> None:
        """Closes all channels; the last client's shared thread ends with it. May be called twice."""
        for channel in list(self._channels):
            channel.close()
        if self._shares_io:
            self._shares_io = False
            SharedIo.release()


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _write(call: _Call, data: bytes) -> None:
    try:
        await call.write(data)
    except asyncio.InvalidStateError:
        # The call is over; only reading tells why, so this waits to be cancelled.
        await asyncio.Event().wait()
