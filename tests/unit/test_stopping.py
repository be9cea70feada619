"""Where an output ends, independent of how its tokens were grouped."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.speculation.errors import InvalidRequestError
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.stopping import StopChecker, StopOutcome
from outrider.speculation.types import FinishReason

EOS = 0
PIECES = ["", "a", "b", "ab", "ba", "aab", "c", "xENDy"]
"""Text of each token; EOS is special and skipped."""


class Pieces:
    """A detokeniser that answers ``lag`` tokens late, as real ones do within a character."""

    def __init__(self, lag: int = 0) -> None:
        self.ids: list[int] = []
        self._lag = lag
        self._given = 0

    def push(self, ids: Sequence[int]) -> str:
        self.ids += ids
        return self._give(max(0, len(self.ids) - self._lag))

    def flush(self) -> str:
        return self._give(len(self.ids))

    def _give(self, end: int) -> str:
        text = "".join(PIECES[token] for token in self.ids[self._given : end])
        self._given = max(self._given, end)
        return text


def checker(lag: int = 0, prompt_length: int = 4, max_model_len: int = 1000, **params: Any) -> StopChecker:
    made = SamplingParams(**{"max_tokens": 100, **params})
    return StopChecker(made, [EOS], prompt_length, max_model_len, Pieces(lag))


def stopped(num_kept: int, stop_reason: int | str | None = None) -> StopOutcome:
    return StopOutcome(num_kept=num_kept, finish_reason=FinishReason.STOP, stop_reason=stop_reason)


def too_long(num_kept: int) -> StopOutcome:
    return StopOutcome(num_kept=num_kept, finish_reason=FinishReason.LENGTH)


def test_output_goes_on_until_something_ends_it() -> None:
    request = checker(stop="zz")
    assert request.push([1, 2]) == StopOutcome(num_kept=2)
    assert request.push([]) == StopOutcome(num_kept=0)
    assert (request.text, request.num_tokens) == ("ab", 2)


@pytest.mark.parametrize("stop", [(), "zz"])
def test_ends_at_the_first_eos_which_is_kept_but_has_no_text(stop: Any) -> None:
    request = checker(stop=stop)
    assert request.push([1, 2, EOS, 3, EOS]) == stopped(3)
    assert (request.text, request.num_tokens) == ("ab", 3)


@pytest.mark.parametrize("stop", [(), "zz"])
def test_a_stop_token_is_named_and_its_text_included_on_demand(stop: Any) -> None:
    for include, text in ((False, "a"), (True, "ac")):
        request = checker(stop_token_ids=[6], stop=stop, include_stop_str_in_output=include)
        assert request.push([1, 6, 2]) == stopped(2, 6)
        assert (request.text, request.num_tokens) == (text, 2)


def test_eos_among_the_stop_tokens_is_eos_unless_ignored() -> None:
    assert checker(stop_token_ids=[EOS]).push([EOS]) == stopped(1)
    assert checker(stop_token_ids=[EOS], ignore_eos=True).push([EOS]) == stopped(1, EOS)


def test_ignored_eos_does_not_end() -> None:
    assert checker(ignore_eos=True).push([1, EOS, 2]) == StopOutcome(num_kept=3)


@pytest.mark.parametrize("stop", [(), "zz"])
def test_min_tokens_shields_its_tokens_from_eos(stop: Any) -> None:
    request = checker(min_tokens=3, stop=stop)
    assert request.push([EOS, 1]) == StopOutcome(num_kept=2)
    assert request.push([EOS, 1, EOS, 1]) == stopped(3)


def test_min_tokens_shields_its_tokens_from_stop_strings() -> None:
    request = checker(min_tokens=2, stop="ab", stop_token_ids=[6])
    assert request.push([3, 6, 1]) == StopOutcome(num_kept=3)
    assert request.push([2, 1]) == stopped(1, "ab")
    assert request.text == "abc"


@pytest.mark.parametrize("stop", [(), "zz"])
def test_max_tokens(stop: Any) -> None:
    request = checker(max_tokens=3, stop=stop)
    assert request.push([1, 1]) == StopOutcome(num_kept=2)
    assert request.push([2, 6]) == too_long(1)
    assert request.text == "aab"


def test_eos_as_the_last_possible_token_is_a_stop() -> None:
    assert checker(max_tokens=2).push([1, EOS, 1]) == stopped(2)
    assert checker(max_tokens=2).push([1, 1, EOS]) == too_long(2)


def test_context_length_ends_even_before_min_tokens() -> None:
    assert checker(prompt_length=6, max_model_len=8, min_tokens=50).push([1, 1, 1]) == too_long(2)


def test_the_prompt_must_leave_room() -> None:
    with pytest.raises(InvalidRequestError, match=r"prompt must be shorter .* 8, not 8 tokens"):
        checker(prompt_length=8, max_model_len=8)


@pytest.mark.parametrize(("include", "text"), [(False, "c"), (True, "caba")])
def test_a_stop_string_over_three_tokens_and_two_commits(include: bool, text: str) -> None:
    request = checker(stop=["aba"], include_stop_str_in_output=include)
    assert request.push([6, 1]) == StopOutcome(num_kept=2)
    assert request.push([2, 3, 6]) == stopped(2, "aba")
    assert (request.text, request.num_tokens) == (text, 4)


@pytest.mark.parametrize(("include", "text"), [(False, "ax"), (True, "axEND")])
def test_text_behind_the_stop_string_is_cut(include: bool, text: str) -> None:
    request = checker(stop=["END"], include_stop_str_in_output=include)
    assert request.push([1, 7, 1]) == stopped(2, "END")
    assert request.text == text
    assert request.take_text() == text


def test_of_several_stop_strings_the_one_that_ends_first_counts() -> None:
    request = checker(stop=["xENDy", "ND", "END"])
    assert request.push([7]) == stopped(1, "END")
    assert request.text == "x"


def test_the_rest_of_the_text_is_searched_at_the_end() -> None:
    request = checker(lag=1, stop=["b"], max_tokens=2)
    assert request.push([1, 2]) == stopped(2, "b")
    assert request.text == "a"


def test_the_detokeniser_never_sees_a_token_behind_the_end() -> None:
    ends = (SamplingParams(stop=["b"]), SamplingParams(max_tokens=2), SamplingParams(stop_token_ids=[6]))
    for params in ends:
        source = Pieces()
        StopChecker(params, [EOS], 1, 99, source).push([1, 2, 6])
        assert source.ids == [1, 2]


def test_streamed_text_waits_while_it_could_begin_a_stop_string() -> None:
    request = checker(stop=["abc", "bx"])
    streamed = [(request.push([token]), request.take_text())[1] for token in (6, 1, 2, 1, 2)]
    assert streamed == ["c", "", "", "ab", ""]
    request.push([6])
    assert request.take_text() == ""
    assert request.text == "cab"


def test_a_stop_string_that_min_tokens_shielded_is_not_held_back() -> None:
    request = checker(min_tokens=5, stop=["ab", "cccc"])
    request.push([3])
    assert request.take_text() == "ab"


def test_all_text_is_released_at_the_end() -> None:
    request = checker(stop=["abc"], max_tokens=2)
    request.push([1, 2])
    assert request.take_text() == "ab"
    assert request.take_text() == ""


def test_nothing_may_follow_the_end() -> None:
    request = checker(max_tokens=1)
    request.push([1])
    with pytest.raises(AssertionError, match="after the end"):
        request.push([1])


def naive(tokens: list[int], params: SamplingParams, limit: int, lag: int) -> tuple[int, str, Any, Any]:
    """Token count, text, finish and stop reason, by looking at every prefix anew."""
    text = ""
    for count in range(1, len(tokens) + 1):
        token, old = tokens[count - 1], text
        eos = token == EOS and not params.ignore_eos
        by_token = count > params.min_tokens and (eos or token in params.stop_token_ids)
        ended = by_token or count == limit
        hidden = by_token and not params.include_stop_str_in_output
        text = "".join(PIECES[t] for t in tokens[: count - hidden if ended else max(0, count - lag)])
        matches = [
            (end, end - len(stop), stop)
            for stop in params.stop
            for end in range(len(old) + 1, len(text) + 1)
            if text[:end].endswith(stop) and count > params.min_tokens
        ]
        if matches:
            end, start, stop = min(matches)
            cut = end if params.include_stop_str_in_output else start
            return count, text[:cut], FinishReason.STOP, stop
        if ended:
            reason = FinishReason.STOP if by_token else FinishReason.LENGTH
            return count, text, reason, token if by_token and not eos else None
    return len(tokens), text, None, None


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[list[int]], SamplingParams, int, int]:
    tokens = st.lists(st.integers(0, len(PIECES) - 1), max_size=5)
    stops = st.text("abcxEND", min_size=1, max_size=4)
    max_tokens = draw(st.integers(1, 20))
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, min(4, max_tokens))),
        stop=draw(st.lists(stops, max_size=3)),
        stop_token_ids=draw(st.sampled_from([(), (6,), (0, 6)])),
        ignore_eos=draw(st.booleans()),
        include_stop_str_in_output=draw(st.booleans()),
    )
    return draw(st.lists(tokens, max_size=6)), params, draw(st.integers(1, 20)), draw(st.integers(0, 2))


@settings(deadline=None, derandomize=True, max_examples=600)
@given(requests())
def test_grouping_of_tokens_and_streaming_change_nothing(
    case: tuple[list[list[int]], SamplingParams, int, int],
) -> None:
    pushes, params, room, lag = case
    request = StopChecker(params, [EOS], 10, 10 + room, Pieces(lag))
    outcome, streamed = StopOutcome(num_kept=0), ""
    for push in pushes:
        outcome = request.push(push)
        streamed += request.take_text()
        if outcome.finish_reason is not None:
            break
    tokens = [token for push in pushes for token in push]
    expected = naive(tokens, params, min(params.max_tokens, room), lag)
    got = (request.num_tokens, request.text, outcome.finish_reason, outcome.stop_reason)
    assert got == expected
    assert request.text.startswith(streamed)
    if outcome.finish_reason is not None:
        assert streamed == request.text
    else:
        held = request.text[len(streamed) :]
        longest = max((len(stop) for stop in params.stop), default=1) - 1
        assert len(held) <= longest
