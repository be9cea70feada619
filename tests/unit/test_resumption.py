"""However often a request is served anew, its caller sees every token and every character once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.cluster.resumption import MOST_FAILOVERS, Progress
from outrider.speculation.errors import ModelError
from outrider.speculation.request import Completion, Request, StepEvent, StepOutput, TokenLogprobs
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.statistics import SpeculationStatistics
from outrider.speculation.types import FinishReason


def progress() -> Progress:
    return Progress(Request(prompt_ids=np.zeros(1, np.int64), params=SamplingParams(seed=1)))


def completion(tokens: Sequence[int], text: str) -> Completion:
    return Completion(
        index=0,
        text=text,
        token_ids=list(tokens),
        finish_reason=FinishReason.LENGTH,
        stop_reason=None,
        stats=SpeculationStatistics(),
    )


def entries(tokens: Sequence[int]) -> list[TokenLogprobs]:
    return [TokenLogprobs(token, -0.5, 1, [], []) for token in tokens]


def events(tokens: Sequence[int], text: str, cuts: Sequence[tuple[int, int, int]]) -> list[StepEvent]:
    """One target's steps: each cut says how far tokens and text have come, and how many were drafted."""
    steps = []
    ends = [*cuts, (len(tokens), len(text), 0)]
    begin_tokens = begin_text = 0
    for number, (end_tokens, end_text, accepted) in enumerate(ends):
        last = number == len(ends) - 1
        output = StepOutput(
            token_ids=list(tokens[begin_tokens:end_tokens]),
            num_accepted=min(accepted, end_tokens - begin_tokens),
            text=text[begin_text:end_text],
            finish_reason=FinishReason.LENGTH if last else None,
            logprobs=entries(tokens[begin_tokens:end_tokens]),
            prompt_logprobs=[None] if begin_tokens == 0 else None,
        )
        done = completion(tokens, text) if last else None
        steps.append(StepEvent(index=0, output=output, completion=done))
        begin_tokens, begin_text = end_tokens, end_text
    return steps


@dataclass
class Case:
    """One list of events per target; each but the last one's is cut short by its death."""

    tokens: list[int]
    text: str
    served: list[list[StepEvent]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tokens = list(range(draw(st.integers(1, 30))))
    text = draw(st.text("abc", max_size=40))

    def serving() -> list[StepEvent]:
        token_ends = sorted(draw(st.sets(st.integers(1, len(tokens)), max_size=8)) - {len(tokens)})
        text_ends = sorted(draw(st.integers(0, len(text))) for _ in token_ends)
        cuts = [(*ends, draw(st.integers(0, 4))) for ends in zip(token_ends, text_ends, strict=True)]
        return events(tokens, text, cuts)

    dying = [serving() for _ in range(draw(st.integers(0, 4)))]
    heard = [each[: draw(st.integers(0, len(each) - 1))] for each in dying]
    return Case(tokens, text, [*heard, serving()])


@settings(derandomize=True, deadline=None, database=None)
@given(cases())
def test_every_token_and_every_character_is_seen_exactly_once(case: Case) -> None:
    one = progress()
    outputs: list[StepOutput] = []
    completions: list[Completion] = []
    for served in case.served:
        one.restart()
        for event in served:
            assert not one.finished
            for item in one.take(event):
                (completions if isinstance(item, Completion) else outputs).append(item)  # type: ignore[arg-type]
    assert [token for each in outputs for token in each.token_ids] == case.tokens
    assert [entry for each in outputs for entry in each.logprobs or ()] == entries(case.tokens)
    assert [each.prompt_logprobs for each in outputs] == [[None]] + [None] * (len(outputs) - 1)
    assert "".join(each.text for each in outputs) == case.text
    assert one.finished
    assert completions == [completion(case.tokens, case.text)]
    assert [each.finish_reason for each in outputs] == [None] * (len(outputs) - 1) + ["length"]
    assert all(0 <= each.num_accepted <= len(each.token_ids) for each in outputs)


@settings(derandomize=True, deadline=None, database=None)
@given(cases())
def test_nothing_is_held_back(case: Case) -> None:
    """After every step the caller has as much as the furthest of all targets sent."""
    one = progress()
    seen_tokens = seen_characters = most_tokens = most_characters = 0
    for served in case.served:
        one.restart()
        sent_tokens = sent_characters = 0
        for event in served:
            assert event.output is not None
            sent_tokens += len(event.output.token_ids)
            sent_characters += len(event.output.text)
            most_tokens, most_characters = (
                max(most_tokens, sent_tokens),
                max(most_characters, sent_characters),
            )
            for item in one.take(event):
                if isinstance(item, StepOutput):
                    seen_tokens += len(item.token_ids)
                    seen_characters += len(item.text)
            assert (seen_tokens, seen_characters) == (most_tokens, most_characters)


def test_an_undisturbed_request_passes_unchanged() -> None:
    one = progress()
    one.restart()
    steps = events([1, 2, 3], "abc", [(1, 0, 0), (2, 2, 1)])
    assert [item for event in steps[:2] for item in one.take(event)] == [each.output for each in steps[:2]]
    assert list(one.take(steps[2])) == [steps[2].output, completion([1, 2, 3], "abc")]


def test_drafted_tokens_that_were_seen_are_not_counted_again() -> None:
    one = progress()
    one.restart()
    list(one.take(events([1, 2, 3, 4], "abcd", [(2, 1, 1)])[0]))
    one.restart()
    (fresh,) = one.take(events([1, 2, 3, 4], "abcd", [(4, 3, 3)])[0])
    assert fresh == StepOutput(token_ids=[3, 4], num_accepted=1, text="bc", logprobs=entries([3, 4]))


def test_an_error_is_raised_and_ends_the_request() -> None:
    one = progress()
    one.restart()
    with pytest.raises(ModelError, match="NaN"):
        list(one.take(StepEvent(index=0, output=None, error=ModelError("NaN"))))
    assert one.finished


def test_what_ends_target_after_target_is_given_up() -> None:
    lost = progress()
    assert [lost.lose() for _ in range(MOST_FAILOVERS)] == [None] * MOST_FAILOVERS
    assert not lost.finished
    assert "4 targets died" in str(lost.lose())
    assert lost.finished
