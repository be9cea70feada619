"""Uses a server with OpenAI's own client, in an environment of its own; prints what came as JSON."""

import json
import sys

import openai

URL, KEY, MODEL, PROMPT = sys.argv[1:]
client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
common = {"model": MODEL, "seed": 3, "max_tokens": 24, "temperature": 0.8}
messages = [{"role": "user", "content": PROMPT}]
found = {"version": openai.__version__, "models": [each.id for each in client.models.list()]}

reply = client.completions.create(prompt=PROMPT, n=2, logprobs=2, **common)
found["completions"] = [each.text for each in reply.choices]
found["completion_logprobs"] = reply.choices[0].logprobs.token_logprobs
found["completion_tokens"] = reply.usage.completion_tokens
found["extra"] = (
    client.completions.create(
        prompt=PROMPT, extra_body={"top_k": 1, "speculative": {"enabled": False}}, **common
    )
    .choices[0]
    .text
)

stream = client.completions.create(
    prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **common
)
chunks = list(stream)
found["completion_stream"] = "".join(each.choices[0].text for each in chunks if each.choices)
found["stream_usage"] = chunks[-1].usage.completion_tokens

chat = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, **common)
found["chat"] = chat.choices[0].message.content
found["chat_logprobs"] = [each.logprob for each in chat.choices[0].logprobs.content]
found["finish_reason"] = chat.choices[0].finish_reason
found["chat_stream"] = "".join(
    chunk.choices[0].delta.content or ""
    for chunk in client.chat.completions.create(messages=messages, stream=True, **common)
    if chunk.choices
)
with client.chat.completions.stream(messages=messages, **common) as helper:
    found["chat_helper"] = helper.get_final_completion().choices[0].message.content
predicted = client.chat.completions.create(
    messages=messages, prediction={"type": "content", "content": found["chat"]}, **common
)
found["predicted"] = predicted.choices[0].message.content
details = predicted.usage.completion_tokens_details
found["prediction_tokens"] = [details.accepted_prediction_tokens, details.rejected_prediction_tokens]

with client.completions.with_streaming_response.create(prompt=PROMPT, **common) as raw:
    found["raw_status"] = raw.status_code


def error_of(action):
    try:
        action()
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.param, error.code and str(error.code)]
    return None


wrong = openai.OpenAI(base_url=f"{URL}/v1", api_key="wrong", max_retries=0)
found["errors"] = {
    "key": error_of(lambda: wrong.models.list()),
    "model": error_of(lambda: client.completions.create(model="other", prompt="a")),
    "field": error_of(lambda: client.completions.create(model=MODEL, prompt="a", temperature=-1)),
    "unsupported": error_of(lambda: client.completions.create(model=MODEL, prompt="a", suffix="b")),
    "path": error_of(lambda: client.embeddings.create(model=MODEL, input="a")),
}
print(json.dumps(found))
