"""GuideLLM: its requests succeed, and its report has the texts and the counts of the engine."""

import json
from pathlib import Path
from typing import Any

import pytest
from instruments.client_environments import CODE, KEY, MODEL, environment, run_client
from instruments.scraped import between, counts
from instruments.serve_process import ServeProcess

from outrider import LLM, SamplingParams
from outrider.cluster.api.fields import content_text
from outrider.models.demo import pair

TOKENS = 24
COMMON = {"seed": 3, "temperature": 0.8}
SPECULATION = {
    "num_drafts": "vllm:spec_decode_num_drafts_total",
    "num_draft_tokens": "vllm:spec_decode_num_draft_tokens_total",
    "num_accepted_draft_tokens": "vllm:spec_decode_num_accepted_tokens_total",
}
"""Of each reply's statistics, with the counter they are added to."""


def settings(server: ServeProcess, route: str, folder: Path) -> dict[str, Any]:
    """A benchmark that sends the prompts one by one. The model is the server's only one."""
    backend = {"kind": "openai_http", "target": server.url, "request_format": route, "api_key": KEY}
    return {
        "backend": {**backend, "extras": {"body": COMMON}},
        "profile": {"kind": "synchronous"},
        "constraints": [{"kind": "max_requests", "count": len(CODE)}],
        "tokenizer": {"kind": "hf_auto", "model": str(pair.TARGET)},
        "data": [{"kind": "json_file", "path": str(folder / "prompts.jsonl")}],
        "outputs": [{"kind": "json", "path": str(folder / "report.json")}],
    }


def engine_text(llm: LLM, request: dict[str, Any]) -> tuple[int, str]:
    """How many tokens the prompt of a request has, and what follows it."""
    if "prompt" in request:
        ids = llm.model.tokenizer.encode(request["prompt"])
    else:
        (message,) = request["messages"]
        text = content_text("content", message["content"])
        ids = llm.model.tokenizer.encode_chat([{"role": message["role"], "content": text}])
    params = SamplingParams(**COMMON, max_tokens=TOKENS, ignore_eos=True)
    return len(ids), llm.generate([ids], params)[0].outputs[0].text


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm(route: str, server: ServeProcess, llm: LLM, tmp_path: Path) -> None:
    rows = [{"prompt": each, "output_tokens_count": TOKENS} for each in CODE]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scenario = tmp_path / "scenario.json"
    scenario.write_text(json.dumps({"spec": settings(server, route, tmp_path)}))
    before = counts(server.url, KEY)
    run_client(
        *(environment("guidellm", torch=True) / "guidellm", "run", "--config", scenario, "--disable-console"),
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        HF_HOME=str(tmp_path / "hub"),
    )
    counted = between(before, counts(server.url, KEY))
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    totals = {"successful": len(CODE), "errored": 0, "incomplete": 0, "total": len(CODE)}
    assert benchmark["metrics"]["request_totals"] == totals
    requests = benchmark["requests"]["successful"]
    for each in requests:
        sent = json.loads(each["request_args"])["body"]
        assert sent["model"] == MODEL
        assert (each["prompt_tokens"], each["output"]) == engine_text(llm, sent)
        assert each["output_tokens"] == TOKENS
    assert sum(each["prompt_tokens"] for each in requests) == counted["vllm:prompt_tokens_total"]
    assert len(CODE) * TOKENS == counted["vllm:generation_tokens_total"]
    replied = [each["response_metrics"]["speculative_decoding"] for each in requests]
    told = {counter: sum(each[name] for each in replied) for name, counter in SPECULATION.items()}
    assert told == {counter: counted[counter] for counter in told}
    assert all(told.values())
