"""What clients may ask for: the request bodies, with OpenAI's and vLLM's field names.

Unknown fields are ignored. Those that others know and Outrider does not serve are refused by name, unless
they ask for nothing.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from outrider.speculation.errors import InvalidRequestError

TokenIds: TypeAlias = list[int]

_NOTHING: tuple[Any, ...] = (None, False, [], {}, "")
_REFUSED: dict[str, tuple[Any, ...]] = {
    # Name: values that ask for nothing, beside the usual ones.
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "documents": (),
    "function_call": ("none",),
    "functions": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": (),
    "mm_processor_kwargs": (),
    "prompt_embeds": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "suffix": (),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (),
    "web_search_options": (),
}


class _Body(BaseModel):
    """Null means the default, as OpenAI's clients send it; values of another type are errors."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _nulls_are_defaults(cls, given: Any) -> Any:
        return (
            {name: value for name, value in given.items() if value is not None}
            if isinstance(given, Mapping)
            else given
        )


class StreamOptions(_Body):
    """include_usage: a last chunk with the usage. continuous_usage_stats: it stands in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Speculative(_Body):
    """Whether and how far drafts are verified for this request; the tokens are the same either way."""

    enabled: bool = True
    num_speculative_tokens: int | None = Field(default=None, ge=0)


class Prediction(_Body):
    """OpenAI's Predicted Outputs: a text that is expected to come, which then drafts."""

    type: Literal["content"] = "content"
    content: str | list[dict[str, Any]]

    @property
    def text(self) -> str:
        return content_text("prediction.content", self.content)


class GenerationBody(_Body):
    """What completions and chat completions have in common; the parameters are those of ``SamplingParams``.

    echo: the prompt stands before the text. return_token_ids: ids stand beside the texts.
    return_draft_tokens: the steps stand beside the texts, and which parts of these were drafted.
    return_tokens_as_token_ids: where logprobs name tokens, ``token_id:N`` stands for their texts.
    """

    model: str | None = None
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: TokenIds = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: str | list[str] = Field(default_factory=list)
    prompt_logprobs: int | None = None
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = False
    return_draft_tokens: bool = False
    return_tokens_as_token_ids: bool = False
    priority: int = 0
    speculative: Speculative = Speculative()
    prediction: Prediction | None = None

    @model_validator(mode="before")
    @classmethod
    def _served(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            for name, harmless in _REFUSED.items():
                value = given.get(name)
                if not _is_one_of(value, (*_NOTHING, *harmless)):
                    raise UnsupportedFieldError(name)
        return given


class CompletionBody(GenerationBody):
    """``POST /v1/completions``. logprobs: how many most probable tokens stand beside each one."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    max_tokens: int = 16
    logprobs: int | None = None
    add_special_tokens: bool = True


class ChatBody(GenerationBody):
    """``POST /v1/chat/completions``. Without a limit the text may fill the context."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class TokenizeBody(_Body):
    """``POST /tokenize``: a prompt, or messages as for chat completions."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    return_token_strs: bool = False


class DetokenizeBody(_Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: TokenIds


class UnsupportedFieldError(InvalidRequestError):
    """A field that others know asks for something that Outrider does not do."""

    def __init__(self, field: str) -> None:
        super().__init__(f"{field} is not supported")
        self.field = field


def content_text(name: str, content: str | list[Any] | None) -> str:
    """The text of a message's content, which may come in parts.

    Raises:
        InvalidRequestError: a part is no text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise InvalidRequestError(f"{name} must be text, and a part of type {kind!r} is not")
    return "".join(part["text"] for part in content)


def _is_one_of(value: Any, known: tuple[Any, ...]) -> bool:
    # 0 == False, but 0 asks for something.
    return any(type(value) is type(each) and value == each for each in known)
