"""Data passes the relay in order, whole, and no sooner than it may."""

import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from outrider.cluster.delay_relay import DelayRelay


@pytest.fixture
def echo() -> Iterator[str]:
    """The address of a server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(65536):
                connection.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def connect(relay: DelayRelay) -> socket.socket:
    host, _, port = relay.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def received(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = connection.recv(65536)
        assert piece, "the connection ended early"
        data += piece
    return data


@pytest.mark.parametrize("one_way", [0.0, 0.01, 0.05])
def test_a_round_trip_takes_both_delays(one_way: float, echo: str) -> None:
    with DelayRelay(echo, one_way) as relay, connect(relay) as connection:
        trips = []
        for number in range(5):
            began = time.monotonic()
            connection.sendall(bytes([number]))
            assert received(connection, 1) == bytes([number])
            trips.append(time.monotonic() - began)
    assert min(trips) >= 2 * one_way
    assert min(trips) < 2 * one_way + 0.1


def test_delays_do_not_add_up(echo: str) -> None:
    """What is on its way at the same time arrives at the same time."""
    with DelayRelay(echo, 0.1) as relay, connect(relay) as connection:
        began = time.monotonic()
        for number in range(50):
            connection.sendall(bytes([number]))
            time.sleep(0.002)
        assert received(connection, 50) == bytes(range(50))
    assert time.monotonic() - began < 2.0


def test_jitter_keeps_the_order(echo: str) -> None:
    draw = random.Random(1)
    sent = bytes(draw.randrange(256) for _ in range(300_000))
    with DelayRelay(echo, lambda: draw.uniform(0, 0.01)) as relay, connect(relay) as connection:
        threading.Thread(target=connection.sendall, args=(sent,), daemon=True).start()
        assert received(connection, len(sent)) == sent


def test_the_end_of_a_connection_passes_through(echo: str) -> None:
    with DelayRelay(echo, 0.01) as relay, connect(relay) as connection:
        connection.sendall(b"last")
        connection.shutdown(socket.SHUT_WR)
        assert received(connection, 4) == b"last"
        assert connection.recv(1) == b""


def test_where_nobody_listens_the_connection_is_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    with DelayRelay(address, 0.0) as relay, connect(relay) as connection:
        assert connection.recv(1) == b""


def test_closing_ends_open_connections(echo: str) -> None:
    relay = DelayRelay(echo, 0.0)
    with connect(relay) as connection:
        connection.sendall(b"x")
        assert received(connection, 1) == b"x"
        relay.close()
        assert connection.recv(1) == b""
