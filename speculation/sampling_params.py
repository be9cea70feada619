"""A request's sampling parameters, under vLLM's names and with vLLM's defaults."""

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from outrider.speculation.errors import InvalidRequestError

GREEDY_BELOW = 1e-5
"""Temperatures under this are 0, as in vLLM: dividing by them could overflow float32."""

MAX_LOGPROBS = 20
"""Most probable tokens that a request may ask for beside each token, as in vLLM and at OpenAI."""

REPETITION_PENALTIES = (1e-6, 1e6)
"""Beyond these, logits and the temperature's quotients may leave float32."""

MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS = 1024, 256
"""Each is looked for in every step."""

_SEEDS = 2**64


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends. Immutable once made.

    n: independent choices for the prompt.
    temperature: 0 takes the most probable token.
    top_p: keep the smallest set of most probable tokens that holds this much probability.
    top_k: keep this many most probable tokens; 0 or -1 keeps all.
    min_p: drop tokens less probable than this fraction of the most probable one.
    repetition_penalty: divides (positive) or multiplies (negative) the logits of tokens
        that stand in the prompt or the output.
    presence_penalty, frequency_penalty: subtracted from the logits of tokens in the
        output, once and once per occurrence.
    seed: of all randomness of the request; None lets the server draw one.
    max_tokens, min_tokens: bounds of the output's length.
    stop: strings that end the output; a bare string is one. Held as a tuple, None as an empty one.
    stop_token_ids: tokens that end the output, beside EOS. Held likewise.
    ignore_eos: EOS does not end the output.
    include_stop_str_in_output: the text ends after the stop string, not before it.
    skip_special_tokens: leave special tokens out of the text.
    logit_bias: added to the logits of these token ids. Held as a dict of its own.
    allowed_token_ids: only these tokens may be chosen. Held as a tuple.
    bad_words: texts that must not come up in the output; a bare string is one. Held as a tuple. Preparing
        a request makes token ids of them, below.
    bad_words_token_ids: sequences of tokens that must not, at most 1,024 of at most 256 tokens. Held as a
        tuple of tuples.
    logprobs: so many most probable tokens beside each token of the output, with log-probabilities;
        0 gives those of the output's tokens alone, None none at all.
    prompt_logprobs: the same for the tokens of the prompt.

    Raises:
        InvalidRequestError: a value has the wrong type or is out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        self._check_integers()
        self._check_reals()
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            _require(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))
        self._set("stop", () if self.stop is None else _strings("stop", self.stop))
        stop_ids = () if self.stop_token_ids is None else _token_ids("stop_token_ids", self.stop_token_ids)
        self._set("stop_token_ids", stop_ids)
        self._set("bad_words", () if self.bad_words is None else _strings("bad_words", self.bad_words))
        self._set("bad_words_token_ids", _words("bad_words_token_ids", self.bad_words_token_ids))
        if self.logit_bias is not None:
            self._set("logit_bias", _biases("logit_bias", self.logit_bias))
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids)
            _require(bool(allowed), "allowed_token_ids", "None or not empty", self.allowed_token_ids)
            self._set("allowed_token_ids", allowed)

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken, without randomness."""
        return self.temperature < GREEDY_BELOW

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuses token ids outside of the model's vocabulary.

        Raises:
            InvalidRequestError: an id is ``vocab_size`` or more.
        """
        groups: dict[str, Iterable[int]] = {
            "stop_token_ids": self.stop_token_ids,
            "logit_bias": self.logit_bias or (),
            "allowed_token_ids": self.allowed_token_ids or (),
            "bad_words_token_ids": chain.from_iterable(self.bad_words_token_ids),
        }
        for name, ids in groups.items():
            for token in ids:
                _require(token < vocab_size, name, f"token ids below the vocabulary size {vocab_size}", token)

    def _check_integers(self) -> None:
        for name, least in (("n", 1), ("top_k", -1), ("max_tokens", 1), ("min_tokens", 0)):
            value = _integer(name, getattr(self, name))
            _require(value >= least, name, f"at least {least}", value)
            self._set(name, value)
        allowed = f"at most max_tokens ({self.max_tokens})"
        _require(self.min_tokens <= self.max_tokens, "min_tokens", allowed, self.min_tokens)
        if self.seed is not None:
            self._set("seed", _integer("seed", self.seed))
            _require(0 <= self.seed < _SEEDS, "seed", "None or within [0, 2**64)", self.seed)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                count = _integer(name, getattr(self, name))
                _require(0 <= count <= MAX_LOGPROBS, name, f"None or within [0, {MAX_LOGPROBS}]", count)
                self._set(name, count)

    def _check_reals(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            self._set(name, _real(name, getattr(self, name)))
        _require(self.temperature >= 0, "temperature", "at least 0", self.temperature)
        _require(0 < self.top_p <= 1, "top_p", "within (0, 1]", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p", "within [0, 1]", self.min_p)
        penalty = self.repetition_penalty
        least, most = REPETITION_PENALTIES
        _require(least <= penalty <= most, "repetition_penalty", f"within [{least}, {most}]", penalty)
        for name in ("presence_penalty", "frequency_penalty"):
            value = _real(name, getattr(self, name))
            _require(-2 <= value <= 2, name, "within [-2, 2]", value)
            self._set(name, value)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _require(holds: bool, name: str, allowed: str, value: object) -> None:
    if not holds:
        raise InvalidRequestError(f"{name} must be {allowed}, not {value!r}")


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InvalidRequestError(f"{name} must be an integer, not {value!r}")
    return int(value)


def _real(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidRequestError(f"{name} must be a finite number, not {value!r}")
    # Integers beyond float's range raise only when converted.
    finite = not isinstance(value, numbers.Integral) or abs(int(value)) < 2**1000
    _require(finite and math.isfinite(value), name, "a finite number", value)
    return float(value)


def _strings(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Sequence):
        raise InvalidRequestError(f"{name} must be a string or a sequence of strings, not {value!r}")
    for item in value:
        _require(isinstance(item, str) and item != "", name, "non-empty strings", item)
    return tuple(value)


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise InvalidRequestError(f"{name} must be a sequence of token ids, not {value!r}")
    return tuple(_token_id(name, item) for item in value)


def _words(name: str, value: object) -> tuple[tuple[int, ...], ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise InvalidRequestError(f"{name} must be sequences of token ids, not {value!r}")
    words = tuple(_token_ids(name, word) for word in value)
    _require(len(words) <= MAX_BAD_WORDS, name, f"at most {MAX_BAD_WORDS} sequences", len(words))
    for word in words:
        _require(bool(word), name, "sequences of at least one token id", word)
        longest = f"sequences of at most {MAX_BAD_WORD_TOKENS} token ids"
        _require(len(word) <= MAX_BAD_WORD_TOKENS, name, longest, f"{len(word)} of them")
    return words


def _token_id(name: str, value: object) -> int:
    token = _integer(name, value)
    _require(token >= 0, name, "token ids of 0 or more", token)
    return token


def _biases(name: str, value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"{name} must be a mapping of token ids to numbers, not {value!r}")
    biases = {_token_id(name, token): _real(name, bias) for token, bias in value.items()}
    for token, bias in biases.items():
        _require(-100 <= bias <= 100, f"{name}[{token}]", "within [-100, 100]", bias)
    return biases
