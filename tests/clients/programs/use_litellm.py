"""Uses a server with LiteLLM, in an environment of its own; prints what came as JSON."""

import json
import sys

import litellm

URL, KEY, MODEL, PROMPT = sys.argv[1:]
where = {"api_base": f"{URL}/v1", "api_key": KEY, "num_retries": 0}
common = {"seed": 3, "max_tokens": 24, "temperature": 0.8, **where}
messages = [{"role": "user", "content": PROMPT}]

chat = litellm.completion(model=f"openai/{MODEL}", messages=messages, **common)
found = {"chat": chat.choices[0].message.content, "completion_tokens": chat.usage.completion_tokens}
found["chat_stream"] = "".join(
    chunk.choices[0].delta.content or ""
    for chunk in litellm.completion(model=f"openai/{MODEL}", messages=messages, stream=True, **common)
)
text = litellm.text_completion(model=f"text-completion-openai/{MODEL}", prompt=PROMPT, **common)
found["completion"] = text.choices[0].text
hosted = litellm.completion(model=f"hosted_vllm/{MODEL}", messages=messages, top_k=1, **common)
found["greedy"] = hosted.choices[0].message.content


def error_of(**changes):
    try:
        litellm.completion(**{"model": f"openai/{MODEL}", "messages": messages, **common, **changes})
    except Exception as error:
        return [type(error).__name__, getattr(error, "status_code", None)]
    return None


found["errors"] = {
    "key": error_of(api_key="wrong"),
    "model": error_of(model="openai/other"),
    "field": error_of(temperature=-1),
}
print(json.dumps(found))
