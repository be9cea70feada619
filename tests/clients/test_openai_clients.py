"""OpenAI's own client and LiteLLM: their objects hold the engine's tokens, and errors are exceptions."""

import json
from pathlib import Path
from typing import Any

import pytest
from instruments.client_environments import KEY, MODEL, environment, run_client
from instruments.serve_process import ServeProcess

from outrider import LLM, SamplingParams
from outrider.speculation.request import Completion

PROGRAMS = Path(__file__).parent / "programs"
PROMPT = "def fibonacci(n):"
COMMON = {"seed": 3, "max_tokens": 24, "temperature": 0.8}


def report(name: str, program: str, server: ServeProcess) -> dict[str, Any]:
    python = environment(name) / "python"
    printed = run_client(python, PROGRAMS / program, server.url, KEY, MODEL, PROMPT)
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def chat_of(llm: LLM, **params: Any) -> Completion:
    ids = llm.model.tokenizer.encode_chat([{"role": "user", "content": PROMPT}])
    return llm.generate([ids], SamplingParams(**{**COMMON, **params}))[0].outputs[0]


@pytest.mark.parametrize("name", ["openai2", "openai3"])
def test_openai(name: str, server: ServeProcess, llm: LLM) -> None:
    found = report(name, "use_openai.py", server)
    assert found["version"].startswith(name[-1])
    (expected,) = llm.generate([PROMPT], SamplingParams(**COMMON, n=2, logprobs=2))
    texts = [each.text for each in expected.outputs]
    assert found["models"] == [MODEL]
    assert found["completions"] == texts
    assert expected.outputs[0].logprobs is not None
    assert found["completion_logprobs"] == [each.logprob for each in expected.outputs[0].logprobs]
    assert found["completion_tokens"] == sum(len(each.token_ids) for each in expected.outputs)
    assert found["completion_stream"] == texts[0]
    assert found["stream_usage"] == len(expected.outputs[0].token_ids)
    assert found["extra"] == llm.generate([PROMPT], SamplingParams(**COMMON, top_k=1))[0].outputs[0].text
    chat = chat_of(llm, logprobs=2)
    for way in ("chat", "chat_stream", "chat_helper", "predicted"):
        assert found[way] == chat.text, way
    assert chat.logprobs is not None
    assert found["chat_logprobs"] == [each.logprob for each in chat.logprobs]
    assert found["finish_reason"] == chat.finish_reason
    assert all(isinstance(count, int) for count in found["prediction_tokens"])
    assert found["raw_status"] == 200
    assert found["errors"] == {
        "key": ["AuthenticationError", 401, None, "invalid_api_key"],
        "model": ["NotFoundError", 404, "model", "model_not_found"],
        "field": ["BadRequestError", 400, "temperature", "400"],
        "unsupported": ["BadRequestError", 400, "suffix", "unsupported_parameter"],
        "path": ["NotFoundError", 404, None, "404"],
    }


def test_litellm(server: ServeProcess, llm: LLM) -> None:
    found = report("litellm", "use_litellm.py", server)
    (expected,) = llm.generate([PROMPT], SamplingParams(**COMMON))
    assert found["completion"] == expected.outputs[0].text
    chat = chat_of(llm)
    assert found["chat"] == found["chat_stream"] == chat.text
    assert found["completion_tokens"] == len(chat.token_ids)
    assert found["greedy"] == chat_of(llm, top_k=1).text
    assert found["errors"] == {
        "key": ["AuthenticationError", 401],
        "model": ["NotFoundError", 404],
        "field": ["BadRequestError", 400],
    }
