"""Sampling parameters: defaults, what is refused and how it is named."""

import copy
import math
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

from outrider.speculation.errors import InvalidRequestError
from outrider.speculation.sampling_params import SamplingParams

VLLM_DEFAULTS = {
    "n": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": None,
    "max_tokens": 16,
    "min_tokens": 0,
    "stop": (),
    "stop_token_ids": (),
    "ignore_eos": False,
    "include_stop_str_in_output": False,
    "skip_special_tokens": True,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": (),
    "bad_words_token_ids": (),
    "logprobs": None,
    "prompt_logprobs": None,
}

ACCEPTED: list[tuple[str, Any]] = [
    ("n", 3),
    ("temperature", 0),
    ("temperature", 5.5),
    ("top_p", 1e-6),
    ("top_p", 1),
    ("top_k", -1),
    ("top_k", 10**9),
    ("min_p", 0),
    ("min_p", 1),
    ("repetition_penalty", 0.01),
    ("presence_penalty", -2),
    ("presence_penalty", 2),
    ("frequency_penalty", -2),
    ("frequency_penalty", 2),
    ("seed", 0),
    ("seed", 2**64 - 1),
    ("max_tokens", 1),
    ("min_tokens", 16),
    ("logit_bias", {0: -100, 7: 100.0}),
    ("allowed_token_ids", (0,)),
    ("stop", ("a", "bc")),
    ("stop_token_ids", (0, 5)),
    *((name, count) for name in ("logprobs", "prompt_logprobs") for count in (0, 20)),
]

NOT_NUMBERS: list[Any] = [math.nan, math.inf, -math.inf, True, "1", None, [1], 10**400, 1j]
NOT_INTEGERS: list[Any] = [1.0, True, "1", [1], math.nan]

REFUSED: list[tuple[str, Any]] = [
    *(
        (name, value)
        for name in ("n", "top_k", "max_tokens", "min_tokens")
        for value in [*NOT_INTEGERS, None]
    ),
    *((name, value) for name in ("seed", "logprobs", "prompt_logprobs") for value in NOT_INTEGERS),
    *((name, count) for name in ("logprobs", "prompt_logprobs") for count in (-1, 21)),
    *(
        (name, value)
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        for value in NOT_NUMBERS
    ),
    *(
        (name, value)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
        for value in (0, 1, None, "yes")
    ),
    ("n", 0),
    ("temperature", -0.1),
    ("top_p", 0.0),
    ("top_p", 1.001),
    ("top_k", -2),
    ("min_p", -0.001),
    ("min_p", 1.001),
    ("repetition_penalty", 0.0),
    ("presence_penalty", 2.01),
    ("presence_penalty", -2.01),
    ("frequency_penalty", 2.01),
    ("frequency_penalty", -2.01),
    ("seed", -1),
    ("seed", 2**64),
    ("max_tokens", 0),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", ["a", 1]),
    ("stop", 5),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [1.5]),
    ("stop_token_ids", [True]),
    ("stop_token_ids", 7),
    ("stop_token_ids", "7"),
    ("logit_bias", {1: 100.5}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", {1: True}),
    ("logit_bias", {-1: 1}),
    ("logit_bias", {"1": 1}),
    ("logit_bias", [1]),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [-3]),
    ("allowed_token_ids", "abc"),
    ("bad_words", ["a", ""]),
    ("bad_words", 5),
    ("bad_words_token_ids", "abc"),
    ("bad_words_token_ids", 7),
    ("bad_words_token_ids", [[1], ()]),
]


def test_defaults_are_those_of_vllm() -> None:
    assert vars(SamplingParams()) == VLLM_DEFAULTS


@pytest.mark.parametrize(("name", "value"), ACCEPTED)
def test_bounds_are_accepted(name: str, value: object) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_refusal_names_parameter_and_value(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(name)
    assert message.endswith(f"not {culprit(name, value)!r}")
    assert "\n" not in message


def culprit(name: str, value: Any) -> Any:
    """The refused item of a collection: its last, or a mapping's only value or bad key."""
    if isinstance(value, dict):
        ((key, bias),) = value.items()
        return bias if isinstance(key, int) and key >= 0 else key
    of_items = name in ("stop", "stop_token_ids", "allowed_token_ids", "bad_words", "bad_words_token_ids")
    return value[-1] if of_items and isinstance(value, list) and value else value


def test_positional_use_is_impossible() -> None:
    with pytest.raises(TypeError):
        SamplingParams(1)  # type: ignore[call-arg]


def test_it_is_immutable_and_keeps_nothing_of_the_callers() -> None:
    ids, bias, stops = [1, 2], {3: 1}, ["a"]
    params = SamplingParams(stop_token_ids=ids, allowed_token_ids=ids, logit_bias=bias, stop=stops)
    ids.append(9)
    bias[9] = 9
    stops.append("b")
    assert (params.stop_token_ids, params.allowed_token_ids) == ((1, 2), (1, 2))
    assert (params.logit_bias, params.stop) == ({3: 1.0}, ("a",))
    with pytest.raises(FrozenInstanceError):
        params.n = 2  # type: ignore[misc]


def test_a_bare_stop_string_is_one_string() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


def test_numpy_numbers_become_python_numbers() -> None:
    params = SamplingParams(
        seed=np.uint64(2**63),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        stop_token_ids=np.array([4]),  # type: ignore[arg-type]
    )
    assert (type(params.seed), type(params.temperature)) == (int, float)
    assert (params.seed, params.temperature, params.stop_token_ids) == (2**63, 0.5, (4,))
    assert type(params.stop_token_ids[0]) is int


def test_it_survives_copying_and_pickling() -> None:
    params = SamplingParams(logit_bias={1: 2}, stop="x", seed=5)
    assert copy.deepcopy(params) == params == pickle.loads(pickle.dumps(params))


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (9e-6, True), (1e-5, False), (1, False)])
def test_tiny_temperatures_are_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).is_greedy is greedy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop_token_ids", [1, 10]),
        ("logit_bias", {10: 1}),
        ("allowed_token_ids", [10]),
        ("bad_words_token_ids", [[1], [2, 10]]),
    ],
)
def test_ids_are_checked_against_the_vocabulary(name: str, value: object) -> None:
    params = SamplingParams(**{name: value})  # type: ignore[arg-type]
    params.check_vocabulary(11)
    with pytest.raises(InvalidRequestError, match=f"^{name} must be .* size 10, not 10$"):
        params.check_vocabulary(10)


@pytest.mark.parametrize(("words", "message"), [([[1]] * 1025, "at most 1024"), ([[1] * 257], "at most 256")])
def test_bad_words_have_limits(words: list[list[int]], message: str) -> None:
    SamplingParams(bad_words_token_ids=[[1] * 256] * 1024)
    with pytest.raises(InvalidRequestError, match=message):
        SamplingParams(bad_words_token_ids=words)


def test_none_stands_for_no_stops_as_in_vllm() -> None:
    params = SamplingParams(stop=None, stop_token_ids=None)  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids) == ((), ())
