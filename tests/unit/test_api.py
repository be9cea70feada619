"""The HTTP API over a target in this process: OpenAI's shapes, and the engine's own tokens."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from outrider import LLM, SamplingParams
from outrider.cluster.api.app import build_app
from outrider.cluster.api.local_backend import LocalBackend
from outrider.cluster.api.service import ModelSettings, ServedModel, Service
from outrider.models.demo import pair

PROMPT = "def fibonacci(n):"
KEY = "sk-outrider"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(max_num_seqs=4, max_model_len=512) as model:
        yield model


@asynccontextmanager
async def client_of(
    llm: LLM, *, keys: tuple[str, ...] = (), **settings: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server that shares the test's event loop."""
    backend = LocalBackend(llm)
    service = Service([ServedModel(backend, ModelSettings(names=("demo", "alias"), **settings))])

    async def make() -> Service:
        return service

    app = build_app(make, keys=keys, max_body=100_000)
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    from_app: asyncio.Queue[Any] = asyncio.Queue()
    life = asyncio.ensure_future(app(scope, to_app.get, from_app.put))
    await to_app.put({"type": "lifespan.startup"})
    assert (await from_app.get())["type"] == "lifespan.startup.complete"
    transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client
    finally:
        # The model outlives this server: only the engine's thread ends.
        await asyncio.to_thread(backend._service._engine.close)
        life.cancel()


def events_of(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_completion_is_the_engine_s(llm: LLM) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=3, n=2)
    (expected,) = llm.generate([PROMPT], params)

    async def ask() -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
        async with client_of(llm) as client:
            body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0.8, "seed": 3, "n": 2}
            body["return_token_ids"] = True
            whole = await client.post("/v1/completions", json=body)
            plain = await client.post("/v1/completions", json={**body, "speculative": {"enabled": False}})
            options = {"stream": True, "stream_options": {"include_usage": True}}
            stream = await client.post("/v1/completions", json={**body, **options})
            return whole.json(), plain.json(), events_of(stream.text)

    whole, plain, events = asyncio.run(ask())
    texts = [each.text for each in expected.outputs]
    assert [choice["text"] for choice in whole["choices"]] == texts
    assert [choice["token_ids"] for choice in whole["choices"]] == [
        each.token_ids for each in expected.outputs
    ]
    assert plain["choices"] == whole["choices"]
    assert plain["metrics"]["speculative_decoding"]["num_spec_steps"] == 0
    assert whole["seed"] == 3
    for index, output in enumerate(expected.outputs):
        mine = [
            event["choices"][0]
            for event in events
            if event["choices"] and event["choices"][0]["index"] == index
        ]
        assert "".join(choice["text"] for choice in mine) == output.text
        assert [choice["finish_reason"] for choice in mine][-1] == output.finish_reason
    assert events[-1]["usage"] == {
        **whole["usage"],
        "prompt_tokens_details": events[-1]["usage"]["prompt_tokens_details"],
    }
    assert whole["usage"]["completion_tokens"] == sum(len(each.token_ids) for each in expected.outputs)


def test_steps_say_which_parts_of_a_text_were_drafted() -> None:
    config = {"model": str(pair.DRAFT), "num_speculative_tokens": 4, "tree": {"adaptive": False}}

    async def ask(llm: LLM) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        async with client_of(llm) as client:
            body = {"prompt": PROMPT, "max_tokens": 32, "temperature": 0.8, "seed": 3, "n": 2}
            body |= {"return_draft_tokens": True, "stop": ["return"]}
            whole = await client.post("/v1/completions", json=body)
            stream = await client.post("/v1/completions", json={**body, "stream": True})
            return whole.json(), events_of(stream.text)

    with LLM(max_num_seqs=2, max_model_len=128, speculative_config=config) as llm:
        whole, events = asyncio.run(ask(llm))
    counted = whole["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"]
    steps = [step for choice in whole["choices"] for step in choice["steps"]]
    assert sum(step["num_tokens"] for step in steps) == whole["usage"]["completion_tokens"]
    # What was accepted behind a text's end is not part of it.
    assert 0 < sum(step["num_accepted"] for step in steps) <= counted
    for index, choice in enumerate(whole["choices"]):
        assert text_of(choice["steps"]) == choice["text"]
        # What is drafted may be different each time, and so may the steps.
        chunks = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert all(text_of(chunk["steps"]) == chunk["text"] for chunk in chunks)
        assert "".join(chunk["text"] for chunk in chunks) == choice["text"]


def text_of(steps: list[dict[str, Any]]) -> str:
    return "".join(part["text"] for step in steps for part in step["parts"])
