"""How long a small gRPC call takes between two machines."""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

ROUND_TRIPS = 50
CALL_SECONDS = 5.0


class EchoServer:
    """Answers ``round_trip`` on a free port of an address until it is collected."""

    def __init__(self, host: str) -> None:
        self._server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), self._server)
        self.address = f"{host}:{self._server.add_insecure_port(f'{host}:0')}"
        self._server.start()


def round_trip(address: str) -> float:
    """Median seconds of a small call to the server at host:port.

    Raises:
        ConnectionError: it does not answer.
    """
    seconds = []
    with grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        try:
            check(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS, wait_for_ready=True)
            for _ in range(ROUND_TRIPS):
                began = time.perf_counter()
                check(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS)
                seconds.append(time.perf_counter() - began)
        except grpc.RpcError as error:
            raise ConnectionError(f"{address} does not answer: {error.code().name}") from None
    return statistics.median(seconds)
