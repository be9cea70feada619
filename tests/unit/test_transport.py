"""Streams between targets and draft workers: handshakes, losses, floods and those who break the rules."""

import asyncio
import socket
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from instruments.streams import CLOSE, LOST
from sockets import (
    HELLO,
    SECONDS,
    WELCOME,
    Recorder,
    address_of,
    events_until,
    impostor,
    next_event,
    serving,
)

from outrider.actors import grpc_client, grpc_server, mailboxes
from outrider.actors.grpc_client import DraftClient
from outrider.actors.io_thread import IoThread
from outrider.actors.transport import Disconnected, Overflowed
from outrider.actors.wire import encode_drafter, encode_target
from outrider.speculation.errors import SlowPeerError
from outrider.speculation.replication.messages import Close, Commit, Growth, Lost, Welcome

GROWTH = Growth(
    session=1,
    generation=1,
    seen_commit=0,
    base_length=5,
    first_id=1,
    parents=np.array([0, 1]),
    tokens=np.array([7, 8]),
    scores=np.array([0.5, 0.25], np.float32),
)
BIG_COMMIT = Commit(
    session=1,
    generation=1,
    sequence=1,
    base_length=1,
    tokens=np.zeros(1 << 20, np.int64),
    prefix_hash=0,
    steps=1,
)


def test_a_stream_begins_with_names_and_carries_both_ways(io: IoThread, client: DraftClient) -> None:
    recorder = Recorder()
    with serving(io, recorder) as server:
        channel = client.connect(address_of(server), HELLO)
        assert channel.send(CLOSE) == 0  # not welcomed yet
        client.wait(SECONDS)
        (welcome,) = channel.receive()
        assert (welcome.event, welcome.num_bytes) == (WELCOME, len(encode_drafter(WELCOME)))
        peer, hello = recorder.next("joined")
        assert hello == HELLO
        sent = channel.send(CLOSE)
        assert sent == len(encode_target(CLOSE))
        assert recorder.next("message") == (peer, (CLOSE, sent))
        peer.send(LOST)
        (answer,) = events_until(client, channel, Lost)
        assert (answer.event, answer.num_bytes) == (LOST, len(encode_drafter(LOST)))
        assert (channel.messages_sent, channel.bytes_sent) == (1, sent)
        assert channel.messages_received == 2
        assert channel.bytes_received == welcome.num_bytes + answer.num_bytes
        channel.close()
        recorder.next("left")
        peer.send(LOST)  # to nobody
        assert channel.send(CLOSE) == 0


def test_a_client_without_a_loop_has_a_thread_of_its_own(io: IoThread) -> None:
    with serving(io) as server:
        before = threading.active_count()
        client = DraftClient()
        channel = client.connect(address_of(server), HELLO)
        next_event(client, channel, Welcome)
        client.close()
        client.close()
        assert threading.active_count() == before


def test_waiting_ends_with_an_arrival_and_otherwise_with_the_time(io: IoThread, client: DraftClient) -> None:
    recorder = Recorder()
    with serving(io, recorder) as server:
        channels = [client.connect(address_of(server), HELLO) for _ in range(2)]
        for channel in channels:
            next_event(client, channel, Welcome)
        began = time.monotonic()
        client.wait(0.03)
        assert time.monotonic() - began >= 0.03
        recorder.next("joined")[0].send(LOST)
        client.wait(SECONDS)
        client.wait(SECONDS)  # nobody has taken it
        arrived = [each.event for channel in channels for each in channel.receive()]
        assert arrived == [LOST]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"protocol_version": 2}, "the target speaks protocol version 1, this draft worker 2"),
        (
            {"vocab_hash": "v-2"},
            "the target's vocabulary is v-1 (target), this draft worker's v-2 (draft)",
        ),
    ],
)
def test_a_worker_names_what_does_not_match(
    io: IoThread, client: DraftClient, change: dict[str, Any], reason: str
) -> None:
    recorder = Recorder()
    with serving(io, recorder, welcome=replace(WELCOME, **change)) as server:
        channel = client.connect(address_of(server), HELLO)
        assert next_event(client, channel, Disconnected).reason == f"FAILED_PRECONDITION: {reason}"
        assert recorder.heard.empty()
        client.wait(0.05)
        assert channel.receive() == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"protocol_version": 2}, "the draft worker speaks protocol version 2, the target 1"),
        (
            {"vocab_hash": "v-2"},
            "the draft worker's vocabulary is v-2 (draft), the target's v-1 (target)",
        ),
    ],
)
def test_a_target_names_what_does_not_match(
    io: IoThread, client: DraftClient, change: dict[str, Any], reason: str
) -> None:
    calls = []

    async def mistaken(_requests: Any, context: Any) -> None:
        calls.append(await context.read())
        await context.write(encode_drafter(replace(WELCOME, **change)))
        await context.read()

    with impostor(io, mistaken) as address:
        channel = client.connect(address, HELLO)
        assert next_event(client, channel, Disconnected).reason == reason
        client.wait(0.05)
        assert len(calls) == 1  # people must mend it; asking again has time


def test_an_absent_worker_is_reported_once(client: DraftClient) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        channel = client.connect(f"127.0.0.1:{taken.getsockname()[1]}", HELLO)
        assert next_event(client, channel, Disconnected).reason.startswith("UNAVAILABLE: ")
        client.wait(0.3)
        assert channel.receive() == []


def test_a_stream_comes_back_after_a_restart_without_what_was_sent_before(
    io: IoThread, client: DraftClient
) -> None:
    recorder = Recorder()
    with serving(io, Recorder()) as server:
        port = server.port
        channel = client.connect(address_of(server), HELLO)
        next_event(client, channel, Welcome)
    with serving(io, recorder, port=port):
        # The new stream is there, but its target has not been told: this is meant for the old one.
        recorder.next("joined")
        assert channel.send(Close(session=99, generation=1)) == 0
        lost, back = [each.event for each in events_until(client, channel, Welcome)]
        assert isinstance(lost, Disconnected)
        assert back == WELCOME
        assert channel.send(CLOSE) > 0
        assert recorder.next("message")[1][0] == CLOSE


def test_a_flood_of_messages_is_cut_and_reported_once(io: IoThread, client: DraftClient) -> None:
    recorder = Recorder()
    with serving(io, recorder) as server:
        channel = client.connect(address_of(server), HELLO)
        next_event(client, channel, Welcome)
        peer, _ = recorder.next("joined")
        count = grpc_client.INBOX_MESSAGES + 100
        for _ in range(count):
            peer.send(LOST)
        deadline = time.monotonic() + SECONDS
        while channel.messages_received <= count and time.monotonic() < deadline:
            time.sleep(0.01)
        events = [each.event for each in channel.receive()]
        assert events == [LOST] * grpc_client.INBOX_MESSAGES + [Overflowed()]
        peer.send(LOST)
        assert [each.event for each in events_until(client, channel, Lost)] == [LOST]


def test_an_inbox_is_bounded_in_bytes() -> None:
    inbox = mailboxes.Inbox(mailboxes.Bell(), max_messages=10, max_bytes=100)
    assert inbox.has_room(100)
    inbox.put(mailboxes.Received(LOST, 60))
    assert not inbox.has_room(41)
    assert not inbox.has_room(41)
    assert [received.event for received in inbox.take()] == [LOST, Overflowed()]
    assert inbox.has_room(41)


def test_a_worker_that_comes_and_goes_fills_nothing() -> None:
    inbox = mailboxes.Inbox(mailboxes.Bell(), max_messages=10, max_bytes=100)
    for number in range(3):
        inbox.put(mailboxes.Received(WELCOME, 10))
        inbox.lose(f"loss {number}")
    assert [received.event for received in inbox.take()] == [Disconnected("loss 2")]


def test_an_outbox_that_nobody_reads_ends_its_stream(io: IoThread) -> None:
    async def fill() -> bool:
        outbox = mailboxes.Outbox(100)
        stuck = asyncio.Event()

        async def write(_data: bytes) -> None:
            await stuck.wait()

        writing = asyncio.create_task(outbox.write_to(write))
        for _ in range(3):
            outbox.put(bytes(40))
        with pytest.raises(SlowPeerError, match="more than 100 bytes were waiting"):
            await writing
        return outbox.put(b"more")

    assert io.run(fill(), SECONDS) is False


def test_a_worker_that_reads_too_slowly_loses_its_stream(
    io: IoThread, client: DraftClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_client, "OUTBOX_BYTES", 1 << 20)

    async def deaf(_requests: Any, context: Any) -> None:
        await context.read()
        await context.write(encode_drafter(WELCOME))
        await asyncio.Event().wait()

    with impostor(io, deaf) as address:
        channel = client.connect(address, HELLO)
        next_event(client, channel, Welcome)
        assert channel.send(BIG_COMMIT) > 4 << 20
        reason = next_event(client, channel, Disconnected).reason
        assert reason == "the draft worker reads too slowly: more than 1048576 bytes were waiting to be read"


def test_a_target_that_reads_too_slowly_loses_its_stream(
    io: IoThread, client: DraftClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_server, "OUTBOX_BYTES", 10)
    recorder = Recorder()
    with serving(io, recorder) as server:
        channel = client.connect(address_of(server), HELLO)
        recorder.next("joined")[0].send(GROWTH)
        recorder.next("left")
        reason = events_until(client, channel, Disconnected)[-1].event.reason
        assert reason == "RESOURCE_EXHAUSTED: more than 10 bytes were waiting to be read"
