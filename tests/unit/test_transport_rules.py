"""Targets and draft workers that break the protocol's rules, by mistake or on purpose."""

import asyncio
import re
import time
from typing import Any

import grpc
import numpy as np
import pytest
from instruments.streams import CLOSE, LOST
from sockets import (
    HELLO,
    SECONDS,
    WELCOME,
    Recorder,
    address_of,
    impostor,
    next_event,
    outcome,
    serving,
)

from outrider.actors import grpc_client, grpc_server
from outrider.actors.grpc_client import DraftClient
from outrider.actors.io_thread import IoThread
from outrider.actors.transport import Disconnected
from outrider.actors.wire import encode_drafter, encode_target
from outrider.speculation.replication.messages import Welcome


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([bytes(17 << 20)], "RESOURCE_EXHAUSTED: .* larger than max"),
        ([b"\xff garbage"], "the draft worker broke the protocol: 9 bytes are no DrafterMessage"),
        ([encode_drafter(LOST)], "the first message must be a Welcome, not Lost"),
        ([encode_drafter(WELCOME), b"\xff"], "the draft worker broke the protocol: 1 bytes are no"),
        ([encode_drafter(WELCOME)] * 2, "a Welcome must be the first message"),
        ([], "the draft worker ended the stream"),
    ],
)
def test_a_worker_that_breaks_the_rules_is_left(
    io: IoThread, client: DraftClient, answers: list[bytes], reason: str
) -> None:
    calls = []

    async def hostile(_requests: Any, context: Any) -> None:
        calls.append(await context.read())
        for answer in answers:
            await context.write(answer)

    with impostor(io, hostile) as address:
        channel = client.connect(address, HELLO)
        lost = next_event(client, channel, Disconnected)
        assert re.search(reason, lost.reason)
        time.sleep(0.05)
        assert len(calls) <= 3


def test_the_pauses_grow_though_each_connection_begins_well(io: IoThread, client: DraftClient) -> None:
    calls = []

    async def hostile(_requests: Any, context: Any) -> None:
        calls.append(time.monotonic())
        await context.read()
        await context.write(encode_drafter(WELCOME))
        await context.write(b"\xff")

    with impostor(io, hostile) as address:
        client.connect(address, HELLO)
        deadline = time.monotonic() + SECONDS
        while len(calls) < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
    pauses = np.diff(calls[:5])
    assert (pauses >= 0.5 * grpc_client.FIRST_PAUSE * 2.0 ** np.arange(4)).all()


def test_a_worker_that_cancels_does_not_end_the_reconnecting(io: IoThread, client: DraftClient) -> None:
    calls = []

    async def cancelling(_requests: Any, context: Any) -> None:
        calls.append(await context.read())
        if len(calls) == 1:
            await context.abort(grpc.StatusCode.CANCELLED, "not now")
        await context.write(encode_drafter(WELCOME))
        await asyncio.Event().wait()

    with impostor(io, cancelling) as address:
        channel = client.connect(address, HELLO)
        assert "cancelled" in next_event(client, channel, Disconnected).reason.lower()
        assert next_event(client, channel, Welcome) == WELCOME


def test_a_worker_that_never_answers_is_left(
    io: IoThread, client: DraftClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_client, "HANDSHAKE_SECONDS", 0.05)

    async def silent(_requests: Any, _context: Any) -> None:
        await asyncio.Event().wait()

    with impostor(io, silent) as address:
        channel = client.connect(address, HELLO)
        assert next_event(client, channel, Disconnected).reason == "the draft worker did not answer in time"


@pytest.mark.parametrize(
    ("frames", "code", "details"),
    [
        ([b"\xff garbage"], "INVALID_ARGUMENT", "9 bytes are no TargetMessage"),
        ([encode_target(CLOSE)], "INVALID_ARGUMENT", "the first message must be a Hello, not Close"),
        ([encode_target(HELLO)] * 2, "INVALID_ARGUMENT", "a Hello must be the first message"),
        ([encode_target(HELLO), b"\xff"], "INVALID_ARGUMENT", "1 bytes are no TargetMessage"),
        ([bytes(17 << 20)], "RESOURCE_EXHAUSTED", "larger than max"),
        ([], "OK", ""),
        ([encode_target(HELLO), encode_target(CLOSE)], "OK", ""),
    ],
)
def test_a_target_that_breaks_the_rules_is_told(
    io: IoThread, frames: list[bytes], code: str, details: str
) -> None:
    recorder = Recorder()
    with serving(io, recorder) as server:
        ended, told = outcome(io, address_of(server), *frames)
        assert ended.name == code
        assert details in told
    heard = [recorder.heard.get()[0] for _ in range(recorder.heard.qsize())]
    assert heard.count("joined") == heard.count("left")


def test_a_target_that_says_nothing_is_left(io: IoThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "HELLO_SECONDS", 0.05)

    async def stay_silent(address: str) -> tuple[grpc.StatusCode, str]:
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.stream_stream("/outrider.v1.Drafting/Replicate")()
            return await call.code(), await call.details()

    with serving(io) as server:
        ended, told = io.run(stay_silent(address_of(server)), SECONDS)
    assert (ended.name, told) == ("DEADLINE_EXCEEDED", "no Hello came within 0.05 s")


def test_more_targets_than_a_worker_serves_are_refused(io: IoThread, client: DraftClient) -> None:
    with serving(io, max_streams=1) as server:
        first = client.connect(address_of(server), HELLO)
        next_event(client, first, Welcome)
        second = client.connect(address_of(server), HELLO)
        reason = next_event(client, second, Disconnected).reason
        assert reason == "RESOURCE_EXHAUSTED: this draft worker serves 1 targets already"
        first.close()
        assert next_event(client, second, Welcome) == WELCOME
