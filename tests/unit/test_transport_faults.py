"""What the network does to streams: silence, vanished peers, taken ports; and that nothing piles up."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from instruments.processes import until
from sockets import (
    HELLO,
    SECONDS,
    WELCOME,
    Recorder,
    address_of,
    connecting,
    events_until,
    next_event,
    outcome,
    serving,
)

from outrider.actors.grpc_server import DraftServer
from outrider.actors.io_thread import IoThread
from outrider.actors.transport import Disconnected
from outrider.actors.wire import SERVICE, encode_target
from outrider.speculation.errors import InvalidConfigError
from outrider.speculation.replication.messages import Close, Welcome


class Relay:
    """A wire between a target and a worker that can go dead without closing."""

    def __init__(self) -> None:
        self._dead = False

    def go_dead(self) -> None:
        self._dead = True

    @asynccontextmanager
    async def to(self, port: int) -> AsyncIterator[int]:
        """The port where the relay listens; it passes on to ``port``."""

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                await asyncio.gather(self._pass_on(reader, far_writer), self._pass_on(far_reader, writer))
            finally:
                writer.close()
                far_writer.close()

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if not self._dead:
                writer.write(data)
        writer.close()


def test_a_worker_that_vanished_is_noticed_within_seconds(io: IoThread) -> None:
    recorder = Recorder()
    with serving(io, recorder) as server, connecting(io) as client:
        relay = Relay()
        wire = relay.to(server.port)
        channel = client.connect(f"127.0.0.1:{io.run(wire.__aenter__(), SECONDS)}", HELLO)
        next_event(client, channel, Welcome)
        recorder.next("joined")
        relay.go_dead()
        began = time.monotonic()
        assert next_event(client, channel, Disconnected).reason.startswith("UNAVAILABLE: ")
        assert time.monotonic() - began < 6  # three, and some for a busy machine
        recorder.next("left")  # the worker notices as well
        channel.close()
        io.run(wire.__aexit__(None, None, None), SECONDS)


def test_a_silent_stream_stays(io: IoThread) -> None:
    # Pings every 500 ms; unprepared servers end a connection after the third or fourth.
    with serving(io) as server, connecting(io) as client:
        channel = client.connect(address_of(server), HELLO)
        next_event(client, channel, Welcome)
        client.wait(3.0)
        assert channel.receive() == []
        assert channel.send(Close(session=1, generation=1)) > 0


def test_a_port_is_served_by_one_worker_only(io: IoThread) -> None:
    with (
        serving(io) as server,
        pytest.raises(InvalidConfigError, match=rf"cannot listen on 127\.0\.0\.1:{server.port}; is the port"),
        serving(io, port=server.port),
    ):
        pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "example.org"])
def test_a_worker_beyond_this_machine_needs_a_token(host: str) -> None:
    with pytest.raises(InvalidConfigError, match="needs a cluster token"):
        DraftServer(WELCOME, Recorder(), host=host)


def test_a_draining_worker_says_so_and_keeps_its_targets(io: IoThread) -> None:
    recorder = Recorder()
    with serving(io, recorder) as server, connecting(io) as client:
        channel = client.connect(address_of(server), HELLO)
        next_event(client, channel, Welcome)
        recorder.next("joined")
        assert _health(io, address_of(server)) == "SERVING"
        io.run(server.drain(), SECONDS)
        assert _health(io, address_of(server)) == "NOT_SERVING"
        assert channel.send(Close(session=1, generation=1)) > 0
        recorder.next("message")
        ended, told = outcome(io, address_of(server), encode_target(HELLO))
        assert (ended.name, told) == ("UNAVAILABLE", "this draft worker is shutting down")


def test_nothing_piles_up_over_200_connections(io: IoThread) -> None:
    async def tasks() -> int:
        return len(asyncio.all_tasks())

    def alive() -> int:
        return io.run(tasks(), SECONDS) + threading.active_count()

    recorder = Recorder()
    with serving(io, recorder) as server, connecting(io) as client:
        for cycle in range(200):
            channel = client.connect(address_of(server), HELLO)
            next_event(client, channel, Welcome)
            # A target that leaves while it is being welcomed has never joined.
            recorder.next("joined")
            channel.close()
            recorder.next("left")
            if cycle == 20:
                before = alive()
        # What serves a stream ends a moment after its target has left.
        assert until(lambda: alive() <= before), f"{alive()} tasks and threads, {before} before"


def test_a_worker_that_stops_tells_its_targets_at_once(io: IoThread) -> None:
    recorder = Recorder()
    with connecting(io) as client:
        with serving(io, recorder) as server:
            channel = client.connect(address_of(server), HELLO)
            next_event(client, channel, Welcome)
            recorder.next("joined")
        recorder.next("left")
        assert len(events_until(client, channel, Disconnected)) == 1


def _health(io: IoThread, address: str) -> str:
    async def check() -> int:
        async with grpc.aio.insecure_channel(address) as channel:
            request = health_pb2.HealthCheckRequest(service=SERVICE)
            return (await health_pb2_grpc.HealthStub(channel).Check(request)).status

    return health_pb2.HealthCheckResponse.ServingStatus.Name(io.run(check(), SECONDS))
