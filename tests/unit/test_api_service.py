"""Admission, counting and going away: what the server does with calls beside answering them."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from conftest import MakeModelFolder
from instruments.api_servers import KeptModel, LiveServer, ScriptedBackend, api_server
from instruments.processes import until
from prometheus_client.parser import text_string_to_metric_families

from outrider import LLM
from outrider.cluster.api.admission import LONGEST_ADVICE, Admission, OverloadedError
from outrider.speculation.statistics import SpeculationStatistics

COMPLETIONS = "/v1/completions"
LONG = 8192
"""Tokens; no test waits for so many."""
ENDLESS = {"prompt": "a", "max_tokens": LONG - 100, "ignore_eos": True}
COUNTERS = (
    "vllm:spec_decode_num_drafts",
    "vllm:spec_decode_num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens",
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:request_success",
)
OTHERS = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds",
)


@pytest.fixture(scope="module")
def llm(make_model_folder: MakeModelFolder) -> Iterator[LLM]:
    folder = make_model_folder("llama", max_position_embeddings=LONG)
    with LLM(str(folder), speculative_config={"method": "ngram"}, max_num_seqs=2) as model:
        yield model


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[LiveServer]:
    with api_server(lambda: KeptModel(llm)) as live:
        yield live


def figures(server: LiveServer) -> dict[str, float]:
    """Samples by name and whatever labels they have beside the usual ones."""
    found = {}
    for family in text_string_to_metric_families(server.client.get("/metrics").text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("engine") == "0"
            assert labels.pop("model_name") == "tiny"
            found[" ".join([sample.name, *labels.values()])] = sample.value
    return found


def test_every_figure_is_there_before_anything_happens(llm: LLM) -> None:
    with api_server(lambda: ScriptedBackend(llm)) as server:
        text = server.client.get("/metrics").text
        shown = figures(server)
    for name in COUNTERS:
        assert any(each.startswith(f"{name}_total") for each in shown), name
        assert f"# TYPE {name}_total counter" in text
    for name in OTHERS:
        assert any(each.startswith(name) for each in shown), name
    assert "# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter" in text


def test_counters_are_what_happened(server: LiveServer) -> None:
    before = figures(server)
    body = {"prompt": ["a naïve café", "b"], "n": 2, "max_tokens": 9, "allowed_token_ids": [5]}
    reply = server.json(COMPLETIONS, body)
    plain = server.json(COMPLETIONS, {**body, "n": 1, "speculative": {"enabled": False}})
    options = {"stream_options": {"include_usage": True}}
    streamed = server.events(COMPLETIONS, {**body, **options, "n": 1, "prompt": "b"})[-1]
    assert server.post(COMPLETIONS, {"prompt": ""}).status_code == 400
    after = figures(server)

    def rise(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    texts = 4 + 2 + 1
    stats = [each["metrics"]["speculative_decoding"] for each in (reply, plain, streamed)]
    assert stats[1]["num_draft_tokens"] == 0
    for name in ("num_draft_tokens", "num_accepted_draft_tokens"):
        counted = name.replace("accepted_draft", "accepted")
        assert rise(f"vllm:spec_decode_{counted}_total") == sum(each[name] for each in stats)
    assert rise("vllm:request_success_total length") == texts
    assert rise("vllm:generation_tokens_total") == texts * 9
    prompt_tokens = reply["usage"]["prompt_tokens"] + plain["usage"]["prompt_tokens"] + 1
    assert rise("vllm:prompt_tokens_total") == prompt_tokens
    assert rise("vllm:prefix_cache_queries_total") == prompt_tokens + reply["usage"]["prompt_tokens"]
    assert rise("vllm:prefix_cache_hits_total") <= rise("vllm:prefix_cache_queries_total")
    assert rise("vllm:e2e_request_latency_seconds_count") == texts
    assert rise("vllm:time_to_first_token_seconds_count") == texts
    assert rise("outrider_requests_refused_total 400") == 1
    assert rise("outrider_requests_cancelled_total") == 0
    assert after["vllm:num_requests_running"] == after["vllm:kv_cache_usage_perc"] == 0


def test_drafts_are_counted_by_position(llm: LLM) -> None:
    def backend() -> ScriptedBackend:
        made = ScriptedBackend(llm)
        made.stats = SpeculationStatistics(
            num_drafts=3, num_draft_tokens=9, num_accepted_tokens=4, num_accepted_tokens_per_pos=[3, 1]
        )
        return made

    with api_server(backend) as server:
        server.json(COMPLETIONS, {"prompt": "a", "n": 2})
        shown = figures(server)
    prefix = "vllm:spec_decode_num_"
    assert shown[f"{prefix}drafts_total"] == 6
    assert shown[f"{prefix}draft_tokens_total"] == 18
    assert shown[f"{prefix}accepted_tokens_total"] == 8
    assert shown[f"{prefix}accepted_tokens_per_pos_total 0"] == 6
    assert shown[f"{prefix}accepted_tokens_per_pos_total 1"] == 2


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_who_goes_away_holds_nothing(stream: bool, server: LiveServer) -> None:
    """Within a second where the machine is idle; on a busy one the best of three has to do."""
    before = figures(server)["outrider_requests_cancelled_total"]
    seconds = []
    for _ in range(3):
        leave = open_call(server, {**ENDLESS, "n": 2, "stream": stream})
        assert until(lambda: server.status()["running"] == 2)
        assert server.status()["kv_cache_usage"] > 0
        leave()
        began = time.monotonic()
        assert until(lambda: server.status()["running"] == 0, pause=0.005)
        seconds.append(time.monotonic() - began)
        assert server.status()["kv_cache_usage"] == 0
    assert min(seconds) < 1
    assert figures(server)["outrider_requests_cancelled_total"] == before + 3


def open_call(server: LiveServer, body: dict[str, Any]) -> Callable[[], None]:
    """A call in progress, and how to go away from it."""
    content = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    connection = socket.create_connection(server.address, timeout=30)
    connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    if body["stream"]:
        assert connection.recv(20).startswith(b"HTTP/1.1 200")
    return connection.close


def test_a_full_queue_answers_at_once(llm: LLM) -> None:
    backends: list[ScriptedBackend] = []

    def backend() -> ScriptedBackend:
        backends.append(ScriptedBackend(llm))
        return backends[0]

    with api_server(backend, waiting_per_slot=0.5) as server:
        backends[0].hold()
        replies: list[httpx.Response] = []
        body = {"prompt": "a", "n": 3}
        caller = threading.Thread(target=lambda: replies.append(server.post(COMPLETIONS, body)))
        caller.start()
        assert until(lambda: len(backends[0].seen) == 3)
        # Three texts are in flight, where two seats and one place in the queue are.
        for given in ({"prompt": "a"}, {"prompt": "a", "stream": True}, {"prompt": "", "n": 0}):
            reply = server.post(COMPLETIONS, given)
            assert reply.status_code == 429
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.json()["error"]["type"] == "rate_limit_error"
        backends[0].let_go()
        caller.join()
        assert replies[0].status_code == 200
        assert server.post(COMPLETIONS, {"prompt": "a"}).status_code == 200
        assert figures(server)["outrider_requests_refused_total 429"] == 3


def test_admission_counts_and_advises() -> None:
    now, slots = [0.0], [2]
    admission = Admission(lambda: slots[0], waiting_per_slot=1.0, clock=lambda: now[0])
    with admission.admitted(3):
        admission.require_room()
        with admission.admitted(2):
            assert admission.in_flight == 5
            with pytest.raises(OverloadedError, match="5 texts are being served or wait") as refused:
                admission.require_room()
            assert refused.value.retry_after == 1
            slots[0] = 3
            admission.require_room()
            slots[0] = 2
            now[0] = 10_000.0
    assert admission.in_flight == 0
    with admission.admitted(4), pytest.raises(OverloadedError) as refused:
        admission.require_room()
    assert refused.value.retry_after == LONGEST_ADVICE
    slots[0] = 0
    with pytest.raises(OverloadedError) as refused:
        admission.require_room()
    assert refused.value.retry_after == 1


def test_an_error_leaves_no_place_taken() -> None:
    admission = Admission(lambda: 1, waiting_per_slot=0.0)
    with pytest.raises(ValueError, match="x"), admission.admitted(1):
        raise ValueError("x")
    assert admission.in_flight == 0
