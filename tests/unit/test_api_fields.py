"""What a body asks for is what the engine is asked: replies are compared with those of an ``LLM``."""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from conftest import END_OF_TEXT, MakeModelFolder
from instruments.api_servers import KeptModel, LiveServer, ScriptedBackend, api_server

from outrider import LLM, SamplingParams
from outrider.speculation.request import Completion

PROMPT = "def fibonacci(n):"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ suffix or '' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
BASE: dict[str, Any] = {"seed": 7, "max_tokens": 12}
ALWAYS_END = {0: 100.0}
"""A bias that makes EOS certain."""
CASES: list[dict[str, Any]] = [
    {"temperature": 0},
    {"top_p": 0.2},
    {"top_k": 1},
    {"min_p": 0.9},
    {"repetition_penalty": 50.0},
    {"presence_penalty": -2.0},
    {"frequency_penalty": -2.0},
    {"seed": 2**63},
    {"max_tokens": 3},
    {"n": 3},
    {"logit_bias": {5: 100}},
    {"allowed_token_ids": [5, 6]},
    {"allowed_token_ids": [5, 6], "bad_words": ["%"]},
    {"logit_bias": ALWAYS_END},
    {"logit_bias": ALWAYS_END, "min_tokens": 4},
    {"logit_bias": ALWAYS_END, "ignore_eos": True},
    {"logit_bias": ALWAYS_END, "ignore_eos": True, "skip_special_tokens": False},
    {"logit_bias": {5: 100}, "stop_token_ids": [5]},
    {"allowed_token_ids": [5, 6], "stop": ["%%"]},
    {"allowed_token_ids": [5, 6], "stop": "%%", "include_stop_str_in_output": True},
    {"logprobs": 2},
    {"prompt_logprobs": 1},
]


@pytest.fixture(scope="module")
def folder(make_model_folder: MakeModelFolder) -> Path:
    return make_model_folder("llama")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    """Decodes plainly, and is what the server's model is compared with."""
    with LLM(str(folder), max_num_seqs=4) as model:
        yield model


@pytest.fixture(scope="module")
def server(folder: Path, make_model_folder: MakeModelFolder) -> Iterator[LiveServer]:
    """Speculates."""
    draft = {"model": str(make_model_folder("llama", seed=1))}
    with (
        LLM(str(folder), speculative_config=draft, max_num_seqs=4) as model,
        api_server(lambda: KeptModel(model), chat_template=TEMPLATE) as live,
    ):
        yield live


def in_json(case: dict[str, Any]) -> dict[str, Any]:
    """As a client would send it: keys are strings."""
    sent: dict[str, Any] = json.loads(json.dumps(case))
    return sent


def seen(done: Completion) -> dict[str, Any]:
    return {
        "text": done.text,
        "token_ids": done.token_ids,
        "finish_reason": done.finish_reason,
        "stop_reason": done.stop_reason,
    }


@pytest.mark.parametrize("case", CASES, ids=[", ".join(case) for case in CASES])
def test_a_parameter_reaches_the_engine(case: dict[str, Any], llm: LLM, server: LiveServer) -> None:
    (expected,) = llm.generate([PROMPT], SamplingParams(**{**BASE, **case}))
    body = {"prompt": PROMPT, **BASE, **in_json(case), "return_token_ids": True}
    reply = server.json("/v1/completions", body)
    for choice, done in zip(reply["choices"], expected.outputs, strict=True):
        assert {name: choice[name] for name in seen(done)} == seen(done)
        if "logprobs" in case:
            assert done.logprobs is not None
            assert choice["logprobs"]["token_logprobs"] == [each.logprob for each in done.logprobs]
    if not case.keys() & {"n", "logprobs", "prompt_logprobs"}:
        (plain,) = llm.generate([PROMPT], SamplingParams(**BASE))
        assert seen(plain.outputs[0]) != seen(expected.outputs[0]), "the case shows nothing"
    if "prompt_logprobs" in case:
        told = reply["choices"][0]["prompt_logprobs"]
        prompt = expected.outputs[0].prompt_logprobs
        assert prompt is not None
        assert told[0] is prompt[0] is None
        for row, token, entry in zip(told[1:], expected.prompt_token_ids[1:], prompt[1:], strict=True):
            assert entry is not None
            assert row[str(token)]["logprob"] == entry.logprob


def test_every_sampling_parameter_is_among_these() -> None:
    sent = {name for case in CASES for name in case}
    # Preparing a request makes these of texts.
    assert sent | {"bad_words_token_ids"} == {each.name for each in fields(SamplingParams)}


def test_eos_is_written_where_special_tokens_are(server: LiveServer) -> None:
    body = {"prompt": PROMPT, "logit_bias": {"0": 100}, "ignore_eos": True, "max_tokens": 2}
    shown = server.json("/v1/completions", {**body, "skip_special_tokens": False})
    assert shown["choices"][0]["text"] == END_OF_TEXT * 2


def test_prompts_in_every_form(llm: LLM, server: LiveServer) -> None:
    ids = llm.generate([PROMPT], SamplingParams(max_tokens=1))[0].prompt_token_ids
    other = "import os"
    params = SamplingParams(**BASE, n=2)
    expected = [each.text for one in llm.generate([PROMPT, other], params) for each in one.outputs]
    other_ids = llm.generate([other], SamplingParams(max_tokens=1))[0].prompt_token_ids

    def texts(prompt: Any) -> list[str]:
        reply = server.json("/v1/completions", {"prompt": prompt, "n": 2, **BASE})
        assert [choice["index"] for choice in reply["choices"]] == list(range(len(reply["choices"])))
        return [choice["text"] for choice in reply["choices"]]

    assert texts(PROMPT) == texts([PROMPT]) == texts(ids) == texts([ids]) == expected[:2]
    assert texts([PROMPT, other]) == texts([ids, other_ids]) == expected


def test_null_is_the_default_and_unknown_fields_are_ignored(server: LiveServer) -> None:
    plain = server.json("/v1/completions", {"prompt": PROMPT, "seed": 1})
    assert plain["usage"]["completion_tokens"] == 16
    names = ("n", "temperature", "max_tokens", "stop", "logit_bias", "stream", "stream_options", "echo")
    more = ("prediction", "speculative", "logprobs", "model", "response_format", "suffix", "best_of")
    nulls = dict.fromkeys((*names, *more))
    extra = {"user": "me", "store": True, "no_such_field": {"deep": [1]}, "tools": [], "tool_choice": "auto"}
    reply = server.json("/v1/completions", {"prompt": PROMPT, "seed": 1, **nulls, **extra})
    assert reply["choices"] == plain["choices"]


def test_echo(llm: LLM, server: LiveServer) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 4, "echo": True, "logprobs": 1}
    (choice,) = server.json("/v1/completions", body)["choices"]
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=1, prompt_logprobs=1)
    (expected,) = llm.generate([PROMPT], params)
    (done,) = expected.outputs
    assert choice["text"] == PROMPT + done.text
    assert done.prompt_logprobs is not None
    assert done.logprobs is not None
    entries = [*done.prompt_logprobs, *done.logprobs]
    assert choice["logprobs"]["token_logprobs"] == [
        None if each is None else each.logprob for each in entries
    ]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    offsets = choice["logprobs"]["text_offset"]
    assert [choice["text"][start:end] for start, end in zip(offsets, [*offsets[1:], None], strict=True)] == (
        choice["logprobs"]["tokens"]
    )
    # Harnesses score a text that is given whole.
    scored = server.json("/v1/completions", {**body, "max_tokens": 0})["choices"][0]
    assert scored["text"] == PROMPT
    assert (
        scored["logprobs"]["token_logprobs"] == choice["logprobs"]["token_logprobs"][: -len(done.token_ids)]
    )


@pytest.mark.parametrize(
    "more", [{}, {"n": 3}, {"stop": ["%%%", "&"]}, {"echo": True, "logprobs": 2}], ids=str
)
def test_a_stream_is_the_whole(more: dict[str, Any], server: LiveServer) -> None:
    body = {"prompt": PROMPT, "seed": 3, "max_tokens": 40, "allowed_token_ids": [5, 6, 200], **more}
    body |= {"return_token_ids": True}
    whole = server.json("/v1/completions", body)
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    *events, last = server.events("/v1/completions", {**body, **options})
    assert last["choices"] == []
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][key] == whole["usage"][key] == events[-1]["usage"][key]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert "usage" not in server.events("/v1/completions", body)[-1]
    for choice in whole["choices"]:
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(each["text"] for each in mine) == choice["text"]
        assert [token for each in mine for token in each["token_ids"]] == choice["token_ids"]
        assert [each["finish_reason"] for each in mine[:-1]] == [None] * (len(mine) - 1)
        for key in ("finish_reason", "stop_reason"):
            assert mine[-1][key] == choice[key]
        if "logprobs" in more:
            for key, values in choice["logprobs"].items():
                assert [entry for each in mine for entry in each["logprobs"][key]] == values, key


def test_a_chat_is_its_template(llm: LLM, server: LiveServer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "def "}, {"type": "text", "text": "f("}]},
    ]
    text = "[system]Be brief.![user]def f(![assistant]"
    (expected,) = llm.generate([text], SamplingParams(**BASE, logprobs=2))
    (done,) = expected.outputs
    body = {"messages": messages, "chat_template_kwargs": {"suffix": "!"}, **BASE}
    body |= {"logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    whole = server.json("/v1/chat/completions", body)
    (choice,) = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": done.text, "refusal": None}
    assert choice["token_ids"] == done.token_ids
    assert choice["prompt_token_ids"] == expected.prompt_token_ids
    entries = choice["logprobs"]["content"]
    assert done.logprobs is not None
    assert [entry["logprob"] for entry in entries] == [each.logprob for each in done.logprobs]
    assert [len(entry["top_logprobs"]) for entry in entries] == [2] * len(entries)
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace") == done.text
    first, *others = [event["choices"][0] for event in server.events("/v1/chat/completions", body)]
    assert first["delta"]["role"] == "assistant"
    deltas = [first["delta"]["content"], *(each["delta"].get("content", "") for each in others)]
    assert "".join(deltas) == done.text
    assert [entry for each in (first, *others) for entry in each["logprobs"]["content"]] == entries
    tokens = server.json("/tokenize", {"messages": messages, "chat_template_kwargs": {"suffix": "!"}})
    assert tokens["tokens"] == expected.prompt_token_ids


def test_a_chat_that_goes_on(llm: LLM, server: LiveServer) -> None:
    messages = [{"role": "user", "content": "f"}, {"role": "assistant", "content": "def f"}]
    (expected,) = llm.generate(["[user]f[assistant]def f"], SamplingParams(**BASE))
    body = {"messages": messages, "continue_final_message": True, "echo": True, **BASE}
    (choice,) = server.json("/v1/chat/completions", body)["choices"]
    assert choice["message"]["content"] == "def f" + expected.outputs[0].text
    short = {**body, "max_completion_tokens": 2, "max_tokens": 12}
    assert server.json("/v1/chat/completions", short)["usage"]["completion_tokens"] == 2


def test_what_no_output_shows_reaches_the_engine_too(llm: LLM) -> None:
    backends: list[ScriptedBackend] = []

    def backend() -> ScriptedBackend:
        backends.append(ScriptedBackend(llm))
        return backends[0]

    with api_server(backend, chat_template=TEMPLATE) as server:
        body = {"prompt": PROMPT, "n": 2, "priority": -3}
        body |= {"speculative": {"enabled": False, "num_speculative_tokens": 2}}
        server.json("/v1/completions", {**body, "prediction": {"type": "content", "content": "import os"}})
        server.json("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
        server.json("/v1/completions", {"prompt": "a", "add_special_tokens": False})
    first, second, chat, bare = backends[0].seen
    ids = llm.model.tokenizer.encode("import os", add_special_tokens=False)
    for choice, request in enumerate((first, second)):
        assert (request.choice, request.priority, request.speculative) == (choice, -3, False)
        assert request.num_speculative_tokens == 2
        assert request.prediction_ids is not None
        assert request.prediction_ids.tolist() == ids
    assert (chat.priority, chat.speculative, chat.prediction_ids) == (0, True, None)
    assert chat.num_speculative_tokens is None
    assert chat.params.max_tokens == llm.model.decoder.max_model_len - len(chat.prompt_ids)
    assert bare.prompt_ids.tolist() == llm.model.tokenizer.encode("a", add_special_tokens=False)
