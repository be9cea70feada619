"""Where there is no room bodies are refused unread; refusals are counted where they belong."""

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import MakeModelFolder
from instruments.api_servers import SECONDS, LiveServer, ScriptedBackend, api_server
from instruments.processes import until
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import Response

from outrider import LLM
from outrider.cluster.api.bodies import BodyAdmission
from outrider.cluster.api.guards import Message, Receive, Scope, Send

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def llm(make_model_folder: MakeModelFolder) -> Iterator[LLM]:
    with LLM(str(make_model_folder("llama")), max_num_seqs=2) as model:
        yield model


def announced(server: LiveServer, path: str, length: int) -> tuple[int, bytes]:
    """Status and answer to a request that says how long its body is, and sends none of it."""
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: application/json\r\n"
    return server.raw(f"{head}content-length: {length}\r\n\r\n".encode())


def test_a_full_queue_refuses_bodies_unread(llm: LLM) -> None:
    backends: list[ScriptedBackend] = []

    def backend() -> ScriptedBackend:
        backends.append(ScriptedBackend(llm))
        return backends[0]

    with api_server(backend, waiting_per_slot=0.0) as server:
        backends[0].hold()
        body = json.dumps({"prompt": ["a", "b"], "max_tokens": 1, "stream": True}).encode()
        headers = {"content-type": "application/json"}
        with server.client.stream("POST", COMPLETIONS, content=body, headers=headers) as held:
            assert held.status_code == 200
            for path in (COMPLETIONS, "/v1/chat/completions"):
                status, answer = announced(server, path, 100_000)
                assert status == 429
                assert b"\r\nretry-after: 1\r\n" in answer
                assert b"2 texts are being served or wait" in answer
            assert server.json("/tokenize", {"prompt": "a"})["count"], "what needs no target is served"
            backends[0].let_go()
        assert until(lambda: server.service.models[0].admission.in_flight == 0, SECONDS)
        assert server.json(COMPLETIONS, {"prompt": "a", "max_tokens": 1})["choices"]


def test_without_a_target_bodies_are_refused_unread(llm: LLM) -> None:
    with api_server(lambda: ScriptedBackend(llm, serving=0)) as server:
        status, answer = announced(server, COMPLETIONS, 100_000)
    assert status == 503
    assert b"\r\nretry-after: " in answer


def test_calls_that_are_made_ready_take_room(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    body, go_on = {"prompt": "a", "max_tokens": 1}, threading.Event()
    with (
        api_server(lambda: ScriptedBackend(llm), waiting_per_slot=0.0) as server,
        ThreadPoolExecutor() as pool,
    ):
        model = server.service.models[0]
        call = model.call
        monkeypatch.setattr(model, "call", lambda given: call(given) if go_on.wait(SECONDS) else None)
        posts = [pool.submit(server.post, COMPLETIONS, body) for _ in range(2)]
        try:
            assert until(lambda: model.admission.in_flight == 2)
            assert server.post(COMPLETIONS, body).status_code == 429
        finally:
            go_on.set()
        assert [each.result().status_code for each in posts] == [200, 200]


class Bodies:
    """Requests to an admission of 100 bytes, of which one body may have 60; they wait to be let through."""

    def __init__(self) -> None:
        self.read, self.refused, self.messages = list[str](), list[str](), list[str]()
        self._go_on = asyncio.Event()
        self._admission = BodyAdmission(
            self._app,
            max_body=60,
            memory=100,
            require_room=lambda: None,
            refuse=self._refuse,
            patience=0.05,
        )

    async def send(self, *headers: tuple[bytes, bytes], body: bytes | None = None) -> "asyncio.Task[None]":
        """One that has come as far as it comes by itself; body: that has arrived."""
        scope = {"type": "http", "path": COMPLETIONS, "headers": list(headers)}

        async def receive() -> Message:
            if headers and body is None:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": body or b"", "more_body": False}

        task = asyncio.ensure_future(self._admission(scope, receive, _ignore))
        await asyncio.sleep(0.001)
        return task

    async def end(self, *tasks: "asyncio.Task[None]") -> None:
        self._go_on.set()
        await asyncio.gather(*tasks)
        self._go_on.clear()

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        self.read.append(str(dict(scope["headers"])))
        self.messages.append((await receive())["type"])
        await self._go_on.wait()

    def _refuse(self, error: Exception) -> Response:
        self.refused.append(str(error))
        return Response(status_code=429)


async def _ignore(message: Message) -> None:
    pass


def length(count: int) -> tuple[bytes, bytes]:
    return b"content-length", b"%d" % count


def test_bodies_together_have_a_limit() -> None:
    async def play() -> Bodies:
        bodies = Bodies()
        first = [await bodies.send(length(60)), await bodies.send(length(40))]
        await bodies.end(await bodies.send(length(1)))
        assert bodies.refused == ["bodies of 100 bytes are being served; try again in 1 s"]
        assert len(bodies.read) == 2
        # Whoever sends none is served whatever others do.
        await bodies.end(*first, await bodies.send())
        assert len(bodies.read) == 3
        # One of unknown length counts as the longest.
        unknown = await bodies.send((b"transfer-encoding", b"chunked"))
        await bodies.end(unknown, await bodies.send(length(40)), await bodies.send(length(1)))
        return bodies

    bodies = asyncio.run(play())
    assert len(bodies.read) == 5
    assert bodies.refused[1:] == ["bodies of 100 bytes are being served; try again in 1 s"]


def test_a_body_that_is_here_counts_what_it_has() -> None:
    async def play() -> Bodies:
        bodies = Bodies()
        unknown = (b"transfer-encoding", b"chunked")
        served = [await bodies.send(unknown, body=bytes(10)) for _ in range(4)]
        assert bodies.refused == []
        waiting = await bodies.send(length(60))
        await bodies.end(await bodies.send(length(1)))
        assert bodies.refused == ["bodies of 100 bytes are being served; try again in 1 s"]
        await bodies.end(*served, waiting)
        # All of it is given back.
        await bodies.end(await bodies.send(length(60)), await bodies.send(length(40)))
        return bodies

    assert len(asyncio.run(play()).refused) == 1


def test_a_body_that_does_not_come_is_given_up() -> None:
    async def play() -> Bodies:
        bodies = Bodies()
        stalled = await bodies.send(length(60))
        await asyncio.sleep(0.06)
        assert bodies.messages == ["http.disconnect"]
        await bodies.end(stalled)
        await bodies.end(await bodies.send(length(60), body=bytes(60)))
        return bodies

    bodies = asyncio.run(play())
    assert bodies.messages[1:] == ["http.request"]
    assert bodies.refused == []


def test_refusals_are_counted_under_the_model_that_was_asked_for(llm: LLM) -> None:
    with api_server(lambda: ScriptedBackend(llm), names=[("one",), ("two", "zwei")]) as server:
        refused: list[tuple[dict[str, Any], int, str]] = [
            ({"model": "two", "prompt": "a", "max_tokens": -1}, 400, "two"),
            ({"model": "zwei", "prompt": "a", "n": "x"}, 400, "two"),
            ({"model": "one", "prompt": "a", "tools": [1]}, 400, "one"),
            ({"model": "three", "prompt": "a"}, 404, ""),
            ({"prompt": "a"}, 404, ""),
        ]
        for body, status, _ in refused:
            assert server.post(COMPLETIONS, body).status_code == status
        families = text_string_to_metric_families(server.client.get("/metrics").text)
    counted = {
        (each.labels["model_name"], each.labels["status"]): each.value
        for family in families
        for each in family.samples
        if each.name == "outrider_requests_refused_total"
    }
    assert counted == {("two", "400"): 2, ("one", "400"): 1, ("", "404"): 2}
