"""Which of a text was drafted, whatever its steps and however late the text comes."""

from collections.abc import Iterator

import numpy as np
import pytest

from outrider.cluster.api.marks import Marks
from outrider.models.demo import pair
from outrider.models.tokenizer import IncrementalDetokenizer, Tokenizer
from outrider.speculation.request import StepOutput
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.stopping import StopChecker
from outrider.speculation.types import FinishReason

TEXT = "def f(n):\n    return 'naïve café, 東京, 😀 or two' # END of it"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(pair.TARGET)


def steps_of(ids: list[int], tokenizer: Tokenizer, stop: list[str], seed: int) -> Iterator[StepOutput]:
    """The ids in steps of random lengths, as an engine's request would put them out."""
    draws = np.random.default_rng(seed)
    params = SamplingParams(max_tokens=len(ids), stop=stop)
    checker = StopChecker(params, (), 1, 10_000, IncrementalDetokenizer(tokenizer))
    while ids:
        accepted = int(draws.integers(0, 5))
        step, ids = ids[: accepted + 1], ids[accepted + 1 :]
        outcome = checker.push(step)
        kept = step[: outcome.num_kept]
        yield StepOutput(
            token_ids=kept,
            num_accepted=min(len(kept), accepted),
            text=checker.take_text(),
            finish_reason=outcome.finish_reason,
        )
        if outcome.finish_reason is not None:
            return


@pytest.mark.parametrize("stop", [[], ["END"], ["or two' # EN?"]])
@pytest.mark.parametrize("seed", range(6))
def test_every_character_is_whose_token_it_came_of(tokenizer: Tokenizer, stop: list[str], seed: int) -> None:
    steps = list(steps_of(tokenizer.encode(TEXT), tokenizer, stop, seed))
    marks = Marks(tokenizer, skip_special_tokens=True)
    found = [marks.take(step) for step in steps]
    assert ["".join(part["text"] for part in each["parts"]) for each in found] == [
        each.text for each in steps
    ]
    assert [(each["num_tokens"], each["num_accepted"]) for each in found] == [
        (len(each.token_ids), each.num_accepted) for each in steps
    ]
    # A character is its last token's: the one with which the text grows by it.
    detokenizer = IncrementalDetokenizer(tokenizer)
    expected = ""
    for step in steps:
        for index, token in enumerate(step.token_ids):
            expected += ("D" if index < step.num_accepted else "o") * len(detokenizer.push([token]))
    shown = "".join(
        ("D" if part["drafted"] else "o") * len(part["text"]) for each in found for part in each["parts"]
    )
    assert shown == expected[: len(shown)]
    assert "D" in shown
    assert len(shown) == sum(len(each.text) for each in steps)


def test_text_that_comes_without_tokens_is_its_tokens(tokenizer: Tokenizer) -> None:
    """As when another target goes on, whose steps end elsewhere."""
    ids = tokenizer.encode(" of a class")
    marks = Marks(tokenizer, skip_special_tokens=True)
    early = marks.take(StepOutput(token_ids=ids, num_accepted=len(ids), text=" of"))
    assert early["parts"] == [{"text": " of", "drafted": True}]
    late = marks.take(
        StepOutput(token_ids=[], num_accepted=0, text=" a class", finish_reason=FinishReason.STOP)
    )
    assert "".join(part["text"] for part in late["parts"]) == " a class"
    assert all(part["drafted"] for part in late["parts"])
    assert late["num_tokens"] == 0
