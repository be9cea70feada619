"""``LLM``: what it refuses, and settings at their limits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outrider import LLM, SamplingParams
from outrider.speculation.errors import (
    InvalidConfigError,
    InvalidRequestError,
    OutOfBlocksError,
    VocabularyMismatchError,
)

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def folder(make_model_folder: Any) -> Path:
    return make_model_folder("llama")


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "no tokens"),
        ([], "no tokens"),
        ([5, -1], "-1"),
        ([5, 300], "300"),
        ([5, 2.5], "2.5"),
        ([[None]], "None"),
        ("a\ud800b", "not valid text"),
        (list(range(1, 200)) * 3, "597 tokens"),
    ],
)
def test_prompts_that_cannot_be_served(prompt: Any, words: str, llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        llm.generate([prompt], GREEDY)


def test_prompts_may_be_numbers_of_any_kind(llm: LLM) -> None:
    (one,) = llm.generate([5, 6, 7], GREEDY)
    (two,) = llm.generate(np.array([5, 6, 7]), GREEDY)  # type: ignore[arg-type]
    (three,) = llm.generate([[np.int64(5), 6, 7]], GREEDY)
    assert one.outputs[0].token_ids == two.outputs[0].token_ids == three.outputs[0].token_ids
    assert [len(each.outputs) for each in llm.generate([[5, 6], "ab"], GREEDY)] == [1, 1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"numerics": "exact"}, "'exact'"),
        ({"dtype": "int3"}, "'int3'"),
        ({"quantization": "int8"}, "the target's numbers must be its own"),
        ({"max_model_len": 1}, "not 1"),
        ({"max_model_len": "64"}, "'64'"),
        ({"max_model_len": 100_000}, "100000"),
        ({"seed": -1}, "-1"),
        ({"speculative_config": "ngram"}, "'ngram'"),
        ({"speculative_config": {"verification": []}}, "verification"),
        ({"speculative_config": {"verification": "magic"}}, "'magic'"),
    ],
)
def test_settings_that_are_not_possible(settings: dict[str, Any], words: str, folder: Path) -> None:
    with pytest.raises(InvalidConfigError, match=words):
        LLM(str(folder), **settings)


def test_a_draft_whose_head_lacks_tokens_is_refused(folder: Path, make_model_folder: Any) -> None:
    small = make_model_folder("llama", vocab_size=290)
    with pytest.raises(VocabularyMismatchError, match="290"):
        LLM(str(folder), speculative_config={"model": str(small)})


def test_a_draft_with_another_padding_drafts(folder: Path, make_model_folder: Any) -> None:
    padded = make_model_folder("llama", vocab_size=384)
    llm = LLM(str(folder), speculative_config={"model": str(padded), "tree": {"adaptive": False}})
    (one,) = llm.generate("the quick", GREEDY)
    (other,) = llm.generate("the quick", GREEDY, speculative=False)
    assert one.outputs[0].token_ids == other.outputs[0].token_ids
    assert one.outputs[0].stats.num_draft_tokens > 0


@pytest.mark.parametrize("limits", [{}, {"max_model_len": 24}])
def test_the_widest_tree_in_the_shortest_context(limits: dict[str, int], folder: Path) -> None:
    config = {
        "model": str(folder),
        "num_speculative_tokens": 63,
        "tree": {"width": 63, "children": 8, "depth": 12, "adaptive": False},
        **limits,
    }
    llm = LLM(str(folder), speculative_config=config, max_model_len=64)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    (one,) = llm.generate([5, 6, 7], params)
    (other,) = llm.generate([5, 6, 7], params, speculative=False)
    assert one.outputs[0].token_ids == other.outputs[0].token_ids
    assert one.outputs[0].stats.num_accepted_tokens > 5


def test_a_second_open_request_is_refused_in_our_words(folder: Path) -> None:
    llm = LLM(str(folder), max_num_seqs=1, max_model_len=64)
    first = llm.stream([5, 6], SamplingParams(temperature=0, max_tokens=62, ignore_eos=True))
    for _ in range(40):
        next(first)
    with pytest.raises(OutOfBlocksError, match="does not fit the KV cache"):
        llm.generate([7, 8], SamplingParams(temperature=0, max_tokens=62, ignore_eos=True))
    first.close()  # type: ignore[attr-defined]
    assert llm.generate([5, 6], GREEDY)


def test_who_is_more_urgent_is_served_first(folder: Path) -> None:
    llm = LLM(str(folder), max_num_seqs=1)
    prompts, served = [[5, 6], [7, 8], [9]], []
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
    start = llm.engine.start
    llm.engine.start = lambda request: served.append(request.prompt_ids.tolist()) or start(request)  # type: ignore
    outputs = llm.generate(prompts, GREEDY, priority=[1, 0, -1])
    assert served == [[9], [7, 8], [5, 6]]
    assert [output.outputs[0].token_ids for output in outputs] == expected
    with pytest.raises(InvalidRequestError, match="priority must be 3 numbers, not 2"):
        llm.generate(prompts, GREEDY, priority=[1, 2])


@pytest.mark.parametrize("caching", [True, False])
def test_repeated_prompts_are_found_unless_that_is_switched_off(folder: Path, caching: bool) -> None:
    llm = LLM(str(folder), enable_prefix_caching=caching)
    prompt = list(range(1, 70))
    first, again = (llm.generate([prompt], GREEDY)[0].outputs[0] for _ in range(2))
    assert first.token_ids == again.token_ids
    assert (first.stats.cached_tokens, again.stats.cached_tokens) == (0, 64 if caching else 0)


def test_streaming_several_choices_is_refused_at_once(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="n must be 1 to stream, not 2"):
        llm.stream("ab", SamplingParams(n=2))
