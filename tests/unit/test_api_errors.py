"""What is refused, and how: no body makes the server fail, and no path goes past its guards."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import MakeModelFolder
from fastapi import FastAPI
from instruments.api_servers import KeptModel, LiveServer, ScriptedBackend, api_server, events_of

from outrider import LLM
from outrider.cluster.api.app import build_app
from outrider.cluster.api.calls import Limits
from outrider.speculation.errors import TargetGroupError

KEY, OTHER_KEY = "sk-outrider", "sk-second"
LIMIT = 100_000
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{{ 1 // divisor if divisor is defined }}"


@pytest.fixture(scope="module")
def llm(make_model_folder: MakeModelFolder) -> Iterator[LLM]:
    with LLM(str(make_model_folder("llama")), max_num_seqs=2) as model:
        yield model


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[LiveServer]:
    limits = Limits(max_tokens=64, max_choices=4)
    with api_server(lambda: KeptModel(llm), max_body=LIMIT, chat_template=TEMPLATE, limits=limits) as live:
        yield live


def error_of(server: LiveServer, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    reply = server.post(path, body)
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return reply.status_code, error


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({}, "prompt", "Field required"),
    ({"prompt": ""}, None, "no tokens"),
    ({"prompt": []}, "prompt", "must not be empty"),
    ({"prompt": [[]]}, None, "no tokens"),
    ({"prompt": {"a": 1}}, "prompt", "prompt"),
    ({"prompt": ["a", 1]}, "prompt", "prompt"),
    ({"prompt": [True]}, "prompt", "prompt"),
    ({"prompt": [10**30]}, None, "not in the vocabulary"),
    ({"prompt": [-1]}, None, "not in the vocabulary"),
    ({"prompt": ["a", "x" * 2000]}, None, "prompt[1]: the prompt has"),
    ({"prompt": "a", "n": 0}, "n", "at least 1"),
    ({"prompt": "a", "n": 10**30}, "n", "at most 4 here"),
    ({"prompt": ["a", "b", "c"], "n": 2}, "n", "not 6"),
    ({"prompt": "a", "n": 1.5}, "n", "integer"),
    ({"prompt": "a", "n": "2"}, "n", "integer"),
    ({"prompt": "a", "max_tokens": 65}, "max_tokens", "at most 64 here"),
    ({"prompt": "a", "max_tokens": 10**30}, "max_tokens", "at most 64 here"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", "at least 1"),
    ({"prompt": "a", "min_tokens": 17}, "min_tokens", "at most max_tokens"),
    ({"prompt": "a", "temperature": -1}, "temperature", "at least 0"),
    ({"prompt": "a", "temperature": "hot"}, "temperature", "number"),
    ({"prompt": "a", "top_p": 0}, "top_p", "(0, 1]"),
    ({"prompt": "a", "repetition_penalty": 1e-300}, "repetition_penalty", "within"),
    ({"prompt": "a", "repetition_penalty": 1e300}, "repetition_penalty", "within"),
    ({"prompt": "a", "seed": -1}, "seed", "[0, 2**64)"),
    ({"prompt": "a", "seed": 10**30}, "seed", "[0, 2**64)"),
    ({"prompt": "a", "stop": [""]}, "stop", "non-empty"),
    ({"prompt": "a", "stop": ["x"] * 129}, "stop", "at most 128"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "token ids as keys"),
    ({"prompt": "a", "logit_bias": {"-5": 1}}, "logit_bias", "token ids as keys"),
    ({"prompt": "a", "logit_bias": {"320": 1}}, "logit_bias", "vocabulary size 300"),
    ({"prompt": "a", "logit_bias": {"5": 101}}, None, "logit_bias[5] must be"),
    ({"prompt": "a", "allowed_token_ids": []}, "allowed_token_ids", "not empty"),
    ({"prompt": "a", "logprobs": 21}, "logprobs", "[0, 20]"),
    ({"prompt": "a", "stream_options": []}, "stream_options", "dictionary"),
    (
        {"prompt": "a", "speculative": {"num_speculative_tokens": -1}},
        "speculative.num_speculative_tokens",
        "",
    ),
    ({"prompt": "a", "prediction": {"content": [{"type": "image"}]}}, None, "type 'image'"),
    ({"prompt": "a", "prediction": {"type": "other", "content": "a"}}, "prediction.type", "content"),
]
BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({}, "Field required"),
    ({"messages": []}, "at least 1 item"),
    ({"messages": "a"}, "list"),
    ({"messages": [1]}, "dictionary"),
    ({"messages": [{"content": "a"}]}, "role"),
    ({"messages": [{"role": 1, "content": "a"}]}, "role"),
    ({"messages": [{"role": "user", "content": 5}]}, "content"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "type 'a'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
    ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "without logprobs"),
    ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"divisor": 0}}, "by zero"),
    ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 65}, "at most 64"),
    *[
        ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {name: None}}, name)
        for name in ("add_generation_prompt", "chat_template", "conversation", "padding", "self", "tools")
    ],
]


@pytest.mark.parametrize(("body", "param", "words"), BAD, ids=[str(body)[:60] for body, _, _ in BAD])
def test_a_field_that_cannot_be_served(
    body: dict[str, Any], param: str | None, words: str, server: LiveServer
) -> None:
    status, error = error_of(server, COMPLETIONS, body)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert words in error["message"]
    assert error_of(server, COMPLETIONS, {**body, "stream": True}) == (status, error)


@pytest.mark.parametrize(("body", "words"), BAD_CHATS, ids=[str(body)[:80] for body, _ in BAD_CHATS])
def test_a_chat_that_cannot_be_served(body: dict[str, Any], words: str, server: LiveServer) -> None:
    status, error = error_of(server, CHAT, body)
    assert status == 400
    assert words in error["message"]


@pytest.mark.parametrize(
    "field",
    [
        *({name: [1]} for name in ("audio", "documents", "functions", "logits_processors", "tools")),
        *({name: {"a": 1}} for name in ("guided_json", "structured_outputs", "web_search_options")),
        *(
            {name: "a"}
            for name in ("chat_template", "guided_regex", "guided_grammar", "suffix", "tool_choice")
        ),
        {"response_format": {"type": "json_object"}},
        {"best_of": 2},
        {"use_beam_search": True},
        {"truncate_prompt_tokens": 0},
    ],
    ids=str,
)
def test_a_field_that_others_serve_is_refused_by_name(field: dict[str, Any], server: LiveServer) -> None:
    (name,) = field
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": [{"role": "user"}]})):
        status, error = error_of(server, path, {**body, **field})
        assert (status, error["param"], error["code"]) == (400, name, "unsupported_parameter")
        assert error["message"] == f"{name} is not supported"


HALF = rb'"\ud800"'
NO_TEXT = [
    (COMPLETIONS, b'{"prompt":%s}' % HALF),
    (COMPLETIONS, b'{"prompt":["a",%s]}' % HALF),
    (COMPLETIONS, b'{"prompt":%s,"add_special_tokens":false}' % HALF),
    (COMPLETIONS, b'{"prompt":"a","prediction":{"content":%s}}' % HALF),
    (CHAT, b'{"messages":[{"role":"user","content":%s}]}' % HALF),
    ("/tokenize", b'{"prompt":%s}' % HALF),
    ("/tokenize", b'{"messages":[{"role":"user","content":%s}]}' % HALF),
    (COMPLETIONS, b'{"prompt":"a","logit_bias":{%s:1}}' % HALF),
    (COMPLETIONS, b'{"prompt":"a","temperature":NaN}'),
    (COMPLETIONS, b'{"prompt":"a","temperature":-Infinity}'),
    (COMPLETIONS, b'{"prompt":"a","temperature":1e400}'),
    (COMPLETIONS, b'{"prompt":"a","max_tokens":1e400}'),
    (COMPLETIONS, b'{"prompt":"a","max_tokens":1%s}' % (b"0" * 5000)),
    (COMPLETIONS, b'{"prompt":"\xff"}'),
    (COMPLETIONS, b'\xff\xfe{"prompt"'),
    (COMPLETIONS, b"[" * 90_000),
    (COMPLETIONS, b'{"prompt":%s%s}' % (b"[" * 40_000, b"]" * 40_000)),
    (CHAT, b'{"messages":[{"role":"user","content":"a","x":%s%s}]}' % (b"[" * 900, b"]" * 900)),
    (COMPLETIONS, b""),
    (COMPLETIONS, b"{"),
    (COMPLETIONS, b"null"),
    (COMPLETIONS, b"[]"),
    ("/detokenize", b'{"tokens":[1000000000000000000000]}'),
    ("/detokenize", b'{"tokens":[-1]}'),
    ("/tokenize", b"{}"),
]


@pytest.mark.parametrize(("path", "body"), NO_TEXT, ids=[f"{path} {body[:50]!r}" for path, body in NO_TEXT])
def test_a_body_that_is_no_text_or_no_json(path: str, body: bytes, server: LiveServer) -> None:
    status, error = error_of(server, path, body)
    # Python's parser goes as deep as its recursion limit allows; what it reads and nobody uses is ignored.
    assert status in ((400, 200) if b'"x"' in body else (400,))
    assert error["type"] == "invalid_request_error"


def test_what_is_wrong_with_a_body_is_said(server: LiveServer) -> None:
    _, error = error_of(server, COMPLETIONS, b'{"prompt":"caf\xe9"}')
    assert error["message"] == "the body is not UTF-8: byte 0xe9 at 14"
    _, error = error_of(server, COMPLETIONS, b"[]")
    assert error["message"] == "the body: should be an object"


def test_harmless_oddities_are_served(server: LiveServer) -> None:
    for body in (
        b'{"prompt":"a\\u0000b","max_tokens":1}',
        b'{"prompt":"a","max_tokens":1,"user":%s}' % HALF,
        b'{"prompt":"a","max_tokens":1,"stop":%s}' % HALF,
        b'{"prompt":"a","max_tokens":1,"top_k":1%s}' % (b"0" * 40),
        b'{"prompt":"a","max_tokens":1,"priority":-1%s}' % (b"0" * 40),
        b'{"prompt":"a","max_tokens":1,"speculative":{"num_speculative_tokens":1%s}}' % (b"0" * 40),
        b'{"prompt":"a","max_tokens":1,"temperature":1e300}',
        b'{"prompt":"a","max_tokens":1,"unused":%s%s}' % (b"[" * 500, b"]" * 500),
    ):
        assert server.post(COMPLETIONS, body).status_code == 200, body


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_a_body_that_is_not_said_to_be_json(kind: str, server: LiveServer) -> None:
    reply = server.client.post(COMPLETIONS, content=b'{"prompt":"a"}', headers={"content-type": kind})
    assert reply.status_code == 415
    assert "application/json" in reply.json()["error"]["message"]


def test_models_methods_and_paths_that_are_not_there(server: LiveServer) -> None:
    assert error_of(server, COMPLETIONS, {"prompt": "a", "model": "other"}) == (
        404,
        {
            "message": "model must be one of 'tiny', 'alias', not 'other'",
            "type": "not_found_error",
            "param": "model",
            "code": "model_not_found",
        },
    )
    for name in ("tiny", "alias"):
        assert server.json(COMPLETIONS, {"prompt": "a", "model": name, "max_tokens": 1})["model"] == name
        assert server.client.get(f"/v1/models/{name}").json()["id"] == name
    assert [row["id"] for row in server.client.get("/v1/models").json()["data"]] == ["tiny", "alias"]
    for method, path, status in (
        ("GET", COMPLETIONS, 405),
        ("PUT", "/health", 405),
        ("GET", "/nothing", 404),
        ("GET", "/health/", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/docs", 404),
    ):
        reply = server.client.request(method, path)
        assert reply.status_code == status
        assert reply.json()["error"]["code"] in (status, "model_not_found")


def test_tokens_there_and_back(server: LiveServer, llm: LLM) -> None:
    reply = server.json("/tokenize", {"prompt": "a naïve 東京", "return_token_strs": True})
    assert reply["tokens"] == llm.model.tokenizer.encode("a naïve 東京")
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"])
    assert reply["max_model_len"] == 512
    assert server.json("/detokenize", {"tokens": reply["tokens"]}) == {"prompt": "a naïve 東京"}


def test_a_body_that_is_too_long(server: LiveServer) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1, "unused": "x" * LIMIT}).encode()
    status, error = error_of(server, COMPLETIONS, body)
    assert (status, error["type"]) == (413, "invalid_request_error")
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    )
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:1000], body[1000:]))
    status, answer = server.raw(head + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
    assert status == 413
    assert b"must have at most 100000 bytes" in answer
    short = b'{"prompt":"a","max_tokens":1}'
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in short)
    assert server.raw(head + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")[0] == 200
    assert server.raw(head + b"content-length: -1\r\n\r\n")[0] in (400, 413)
    assert server.client.get("/health").status_code == 200


def routes_of(app: Any) -> list[tuple[str, str]]:
    """Of the application behind the guards."""
    while not isinstance(app, FastAPI):
        app = app._app
    return sorted(
        (method, route.path.replace("{name:path}", "tiny").replace("{name}", "app.js"))
        for route in app.routes
        for method in getattr(route, "methods", None) or {"GET"}
    )


async def _nothing() -> Any:
    raise NotImplementedError


def test_every_route_but_health_needs_a_key(llm: LLM) -> None:
    routes = routes_of(build_app(_nothing))
    assert ("POST", COMPLETIONS) in routes
    assert ("GET", "/openapi.json") in routes
    wrong = [
        None,
        "",
        "Bearer",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Basic {KEY}",
        KEY,
        "Bearer \xff",
        "Basic " + base64.b64encode(KEY.encode()).decode(),
        "Basic " + base64.b64encode(f"{KEY}:wrong".encode()).decode(),
        "Basic !!!",
    ]
    right = [
        f"Bearer {KEY}",
        f"bearer {OTHER_KEY}",
        "Basic " + base64.b64encode(f"anybody:{KEY}".encode()).decode(),
    ]
    with api_server(lambda: ScriptedBackend(llm), keys=(KEY, OTHER_KEY)) as server:
        for method, path in routes:
            for header in wrong:
                headers = [] if header is None else [(b"authorization", header.encode("latin-1"))]
                reply = server.client.request(method, path, headers=headers)
                if path == "/health":
                    assert reply.status_code in (200, 405)
                    continue
                assert (reply.status_code, method, path) == (401, method, path)
                if method != "HEAD":
                    assert reply.json()["error"]["code"] == "invalid_api_key"
                assert "basic" in reply.headers["www-authenticate"].lower()
            for header in right:
                reply = server.client.request(method, path, headers={"authorization": header})
                assert reply.status_code != 401
        for odd in (
            "//health",
            "/health/",
            "/health/../v1/models",
            "/health%2f..%2fmetrics",
            "/%2e/health",
            "/./health",
            "/HEALTH",
            "/health%00",
            "/health;x",
            "http://x/metrics",
            "/v1//models",
            "*",
        ):
            status, answer = server.raw(
                b"GET %s HTTP/1.1\r\nhost: health\r\nconnection: close\r\n\r\n" % odd.encode()
            )
            assert status in (400, 401), (odd, answer)
        for same in ("/health", "/%68ealth", "/health?x=/metrics"):
            head = b"GET %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % same.encode()
            assert server.raw(head)[0] == 200
        upgrade = b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
        upgrade += b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        assert server.raw(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n" + upgrade)[0] in (401, 403)
        # Nothing that was refused came as far as the models.
        assert (
            "outrider_requests_refused_total"
            in server.client.get("/metrics", headers={"authorization": right[0]}).text
        )


def test_a_target_that_does_not_serve(llm: LLM) -> None:
    with api_server(lambda: ScriptedBackend(llm, serving=0)) as server:
        for stream in (False, True):
            reply = server.post(COMPLETIONS, {"prompt": "a", "stream": stream})
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
            assert reply.json()["error"]["type"] == "service_unavailable_error"
        health = server.client.get("/health")
        assert (health.status_code, health.headers["retry-after"]) == (503, "5")
        assert server.client.get("/v1/models").status_code == 200
        assert server.client.get("/metrics").status_code == 200
        assert server.status()["serving"] == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [(TargetGroupError("rank 1 is gone"), "rank 1 is gone"), (RuntimeError("secret"), "internal error")],
    ids=["known", "unknown"],
)
def test_a_target_that_fails_half_way(llm: LLM, error: Exception, message: str) -> None:
    backends: list[ScriptedBackend] = []

    def backend() -> ScriptedBackend:
        backends.append(ScriptedBackend(llm))
        backends[0].error = error
        return backends[0]

    with api_server(backend) as server:
        reply = server.post(COMPLETIONS, {"prompt": "a"})
        assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
        assert message in reply.json()["error"]["message"]
        assert "secret" not in reply.text
        if isinstance(error, TargetGroupError):
            streamed = server.post(COMPLETIONS, {"prompt": "a", "stream": True})
            token, failure = events_of(streamed.text)
            assert token["choices"][0]["text"] == "x"
            assert failure["error"]["message"] == message
        backends[0].error = None
        assert server.post(COMPLETIONS, {"prompt": "a"}).status_code == 200
        # Nobody went away.
        assert 'outrider_requests_cancelled_total{engine="0",model_name="tiny"} 0.0' in (
            server.client.get("/metrics").text
        )
