"""From a request's body to what an engine is asked: prompts, parameters, one request per choice."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from outrider.cluster.api.fields import ChatBody, CompletionBody, GenerationBody, TokenizeBody, content_text
from outrider.cluster.preparation import Preparation
from outrider.models.tokenizer import Tokenizer
from outrider.speculation.errors import InvalidRequestError
from outrider.speculation.request import Request
from outrider.speculation.sampling_params import SamplingParams

MAX_STOPS = 128
"""Stop strings of a request, and bad words: each is looked for after every token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one request. None: the model's context is the only limit."""

    max_tokens: int | None = None
    max_choices: int = 128
    """Texts that one request may ask for: its prompts times ``n``."""

    def within(self, max_tokens: int | None, max_choices: int | None) -> "Limits":
        """The tighter of these and others, where there are others."""
        return Limits(
            max_tokens=_tighter(self.max_tokens, max_tokens),
            max_choices=self.max_choices if max_choices is None else min(self.max_choices, max_choices),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What one HTTP request asks for.

    prompts: texts, as far as they were given or are wanted. requests: those of the first prompt's
    choices, then the next one's. keeps_text: False where only the prompt is looked at.
    """

    prompts: list[str]
    requests: list[Request]
    n: int
    seed: int
    keeps_text: bool = True

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt_ids) for request in self.requests[:: self.n])


def completion_call(body: CompletionBody, prepare: Preparation, limits: Limits) -> Call:
    """
    Raises:
        InvalidRequestError: it cannot be served.
    """
    # Evaluation harnesses score prompts with max_tokens 0; the one token that a step gives is dropped.
    wanted = body.max_tokens
    most = max(1, wanted) if body.echo and wanted == 0 else wanted
    scores = body.logprobs if body.echo else None
    params = _params(
        body,
        max_tokens=_limited("max_tokens", most, limits),
        logprobs=body.logprobs,
        prompt_logprobs=body.prompt_logprobs if body.prompt_logprobs is not None else scores,
    )
    prompts = _prompts(body.prompt)
    _limit_choices(len(prompts), params.n, limits)
    if not body.add_special_tokens:
        tokenizer = prepare.tokenizer
        encode = tokenizer.encode
        prompts = [
            encode(each, add_special_tokens=False) if isinstance(each, str) else each for each in prompts
        ]
    prepared = []
    for number, prompt in enumerate(prompts):
        try:
            prepared.append(prepare.requests(prompt, params, speculative=body.speculative.enabled))
        except InvalidRequestError as error:
            if len(prompts) == 1:
                raise
            raise InvalidRequestError(f"prompt[{number}]: {error}") from error
    return _call(body, prepared, params.n, prepare, keeps_text=wanted > 0 or not body.echo)


def chat_call(body: ChatBody, prepare: Preparation, template: str | None, limits: Limits) -> Call:
    """
    Raises:
        InvalidRequestError: it cannot be served.
    """
    ids = _conversation(body, prepare.tokenizer, template)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequestError(f"top_logprobs must be 0 without logprobs, not {body.top_logprobs}")
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    room = max(1, prepare.max_model_len - len(ids))
    if asked is None:
        most = room if limits.max_tokens is None else min(room, limits.max_tokens)
    else:
        most = _limited("max_tokens", asked, limits)
    params = _params(
        body,
        max_tokens=most,
        logprobs=body.top_logprobs if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )
    _limit_choices(1, params.n, limits)
    prepared = prepare.requests(ids, params, speculative=body.speculative.enabled)
    return _call(body, [prepared], params.n, prepare, keeps_text=True)


def token_ids(body: TokenizeBody, tokenizer: Tokenizer, template: str | None) -> list[int]:
    """
    Raises:
        InvalidRequestError: there is no text to tokenize, or it is none.
    """
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("either prompt or messages must be given")
    if body.messages is not None:
        return _conversation(body, tokenizer, template)
    assert body.prompt is not None
    return tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)


def _conversation(body: ChatBody | TokenizeBody, tokenizer: Tokenizer, template: str | None) -> list[int]:
    messages = []
    for number, message in enumerate(body.messages or []):
        if not isinstance(message.get("role"), str):
            raise InvalidRequestError(
                f"messages[{number}].role must be a string, not {message.get('role')!r}"
            )
        content = message.get("content")
        if not (content is None or isinstance(content, str | list)):
            raise InvalidRequestError(f"messages[{number}].content must be text, not {content!r}")
        messages.append({**message, "content": content_text(f"messages[{number}].content", content)})
    return tokenizer.encode_chat(
        messages,
        template=template,
        # Both at once would ask for two opposite ends.
        add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
        continue_final_message=body.continue_final_message,
        variables=body.chat_template_kwargs,
    )


def _params(body: GenerationBody, **more: Any) -> SamplingParams:
    for name in ("stop", "bad_words"):
        texts = getattr(body, name)
        if isinstance(texts, list) and len(texts) > MAX_STOPS:
            raise InvalidRequestError(f"{name} must be at most {MAX_STOPS} strings, not {len(texts)}")
    bias = None if body.logit_bias is None else {_token(key): each for key, each in body.logit_bias.items()}
    return SamplingParams(
        n=body.n,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        seed=body.seed,
        stop=body.stop,
        stop_token_ids=body.stop_token_ids,
        include_stop_str_in_output=body.include_stop_str_in_output,
        ignore_eos=body.ignore_eos,
        min_tokens=body.min_tokens,
        skip_special_tokens=body.skip_special_tokens,
        logit_bias=bias,
        allowed_token_ids=body.allowed_token_ids,
        bad_words=body.bad_words,
        **{name: value for name, value in more.items() if value is not None},
    )


def _token(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 12):
        raise InvalidRequestError(f"logit_bias must have token ids as keys, not {key!r}")
    return int(key)


def _prompts(given: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]) -> list[str | list[int]]:
    """One prompt or several; a list of numbers is one."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise InvalidRequestError("prompt must not be empty")
    if isinstance(given[0], int):
        return [list(given)]  # type: ignore[arg-type]
    return list(given)  # type: ignore[arg-type]


def _tighter(one: int | None, other: int | None) -> int | None:
    return min((each for each in (one, other) if each is not None), default=None)


def _limited(name: str, value: int, limits: Limits) -> int:
    if limits.max_tokens is not None and value > limits.max_tokens:
        raise InvalidRequestError(f"{name} must be at most {limits.max_tokens} here, not {value}")
    return value


def _limit_choices(prompts: int, n: int, limits: Limits) -> None:
    if prompts * n > limits.max_choices:
        raise InvalidRequestError(
            f"n must be at most {limits.max_choices} here, over all prompts, not {prompts * n}"
        )


def _call(
    body: GenerationBody,
    prepared: list[tuple[str, list[Request]]],
    n: int,
    prepare: Preparation,
    *,
    keeps_text: bool,
) -> Call:
    settings: dict[str, object] = {"priority": body.priority}
    if body.speculative.num_speculative_tokens is not None:
        settings["num_speculative_tokens"] = body.speculative.num_speculative_tokens
    if body.prediction is not None:
        predicted = prepare.tokenizer.encode(body.prediction.text, add_special_tokens=False)
        settings["prediction_ids"] = np.array(predicted, np.int64)
    requests = [replace(each, **settings) for _, each_s in prepared for each in each_s]  # type: ignore[arg-type]
    seed = requests[0].params.seed
    assert seed is not None
    return Call(
        prompts=[text for text, _ in prepared], requests=requests, n=n, seed=seed, keeps_text=keeps_text
    )
