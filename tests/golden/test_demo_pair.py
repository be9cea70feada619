"""The embedded pair end to end: what a user gets without arguments, checked from outside."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

from outrider import LLM, SamplingParams
from outrider.models.config import load_config
from outrider.models.demo import corpus, pair
from outrider.models.inflate import count_parameters
from outrider.models.weights import Checkpoint

FALSE_ALARM = 1e-4


@pytest.fixture(scope="module")
def llm() -> LLM:
    """Always drafting, so that every comparison verifies trees."""
    config = {
        "model": str(pair.DRAFT),
        "num_speculative_tokens": 12,
        "tree": {"adaptive": False, "depth": 5},
    }
    return LLM(str(pair.TARGET), speculative_config=config)


def parameters(folder: Path) -> int:
    return count_parameters(load_config(folder), Checkpoint(folder))


def test_sizes_and_format() -> None:
    target, draft = parameters(pair.TARGET), parameters(pair.DRAFT)
    assert 8e6 <= target <= 12e6
    assert draft * 5 <= target
    for folder in (pair.TARGET, pair.DRAFT):
        assert load_config(folder).dtype == "bfloat16"
    figures = json.loads((pair.TARGET.parent / "corpus.json").read_text())
    assert figures["held_out_packages"] == list(corpus.HELD_OUT_PACKAGES)
    assert figures["held_out_ngrams_seen_in_training"]["32"] < 0.05


def test_no_held_out_file_is_trained_on() -> None:
    trained = set(corpus.source_files(held_out=False))
    held_out = set(corpus.source_files(held_out=True))
    assert not trained & held_out
    assert Path("argparse.py") in held_out
    assert Path("ast.py") in trained
    assert not any("argparse" in path.name for path in trained)


SETTINGS = {
    "greedy": SamplingParams(temperature=0, max_tokens=48),
    "top-p": SamplingParams(temperature=0.7, top_p=0.9, max_tokens=48),
    "sampled": SamplingParams(temperature=1.0, max_tokens=48),
    "penalties": SamplingParams(
        temperature=1.0,
        repetition_penalty=1.1,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        min_tokens=10,
        logit_bias={17: 2.0},
        max_tokens=48,
        n=2,
    ),
    "stop": SamplingParams(temperature=0.7, stop=["self.", "):\n"], top_k=40, min_p=0.01, max_tokens=48),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_speculation_changes_no_token(name: str, llm: LLM) -> None:
    accepted = 0
    for seed, prompt in enumerate(corpus.held_out_prompts(10)):
        params = replace(SETTINGS[name], seed=seed)
        fast = llm.generate(prompt, params)[0].outputs
        plain = llm.generate(prompt, params, speculative=False)[0].outputs
        for one, other in zip(fast, plain, strict=True):
            assert one.token_ids == other.token_ids
            assert (one.text, one.finish_reason, one.stop_reason) == (
                other.text,
                other.finish_reason,
                other.stop_reason,
            )
            accepted += one.stats.accepted_by_drafter.get("draft_model", 0)
            assert not other.stats.num_draft_tokens
    assert accepted > 100, "nothing was shown if nothing was drafted"


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_bad_words_do_not_come_up(temperature: float, llm: LLM) -> None:
    """Words of the text that would come without them: of one token, of two, and of three."""
    tokenizer, accepted = llm.model.tokenizer, 0
    for seed, prompt in enumerate(corpus.held_out_prompts(4)):
        params = SamplingParams(temperature=temperature, max_tokens=48, seed=seed, ignore_eos=True)
        free = llm.generate(prompt, params)[0].outputs[0].token_ids
        ids = [free[start : start + size] for start, size in ((6, 1), (20, 2), (33, 3))]
        words = [tokenizer.decode(each) for each in ids]
        params = replace(params, bad_words=[each for each in words if each.strip()], bad_words_token_ids=ids)
        done = llm.generate(prompt, params)[0].outputs[0]
        plain = llm.generate(prompt, params, speculative=False)[0].outputs[0]
        assert done.token_ids == plain.token_ids != free
        for word in ids:
            starts = range(len(done.token_ids))
            assert not any(done.token_ids[start : start + len(word)] == word for start in starts)
        accepted += done.stats.num_accepted_tokens
    assert accepted > 60


@pytest.mark.parametrize(("temperature", "floor"), [(0.0, 0.80), (1.0, 0.55)])
def test_the_draft_s_first_choice_is_often_the_target_s_token(temperature: float, floor: float) -> None:
    config = {
        "model": str(pair.DRAFT),
        "num_speculative_tokens": 1,
        "tree": {"adaptive": False, "depth": 1},
    }
    llm = LLM(str(pair.TARGET), speculative_config=config)
    drafted = accepted = 0
    for seed, prompt in enumerate(corpus.held_out_prompts(32)):
        params = SamplingParams(temperature=temperature, max_tokens=64, seed=seed, ignore_eos=True)
        found = llm.generate(prompt, params)[0].outputs[0].stats
        drafted += found.num_draft_tokens
        accepted += found.num_accepted_tokens
    assert drafted > 800
    assert accepted / drafted >= floor


def test_n_choices_differ_and_come_back_with_the_seed(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, n=3, max_tokens=24)
    (first,) = llm.generate("import os\n", params)
    texts = [choice.text for choice in first.outputs]
    assert len(set(texts)) == 3
    (again,) = llm.generate("import os\n", replace(params, seed=first.seed))
    assert [choice.text for choice in again.outputs] == texts


def test_a_prompt_lookup_changes_no_token_either() -> None:
    config = {"method": "ngram", "num_speculative_tokens": 6, "tree": {"adaptive": False}}
    llm = LLM(str(pair.TARGET), speculative_config=config)
    accepted = 0
    for prompt in corpus.held_out_prompts(6):
        params = SamplingParams(temperature=0, max_tokens=64)
        (one,) = llm.generate(prompt, params)[0].outputs
        (other,) = llm.generate(prompt, params, speculative=False)[0].outputs
        assert one.token_ids == other.token_ids
        accepted += one.stats.num_accepted_tokens
    assert accepted > 20


def test_plain_greedy_text_is_transformers_in_float32() -> None:
    llm = LLM(str(pair.TARGET), dtype="float32", numerics="fast")
    canonical = LLM(str(pair.TARGET), dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(pair.TARGET, dtype=torch.float32)
    for prompt in corpus.held_out_prompts(6):
        ids = torch.tensor([llm.model.tokenizer.encode(prompt)])
        with torch.inference_mode():
            reference = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=48, pad_token_id=0
            )
        expected = reference[0, ids.shape[1] :].tolist()
        params = SamplingParams(temperature=0, max_tokens=48)
        for engine in (llm, canonical):
            assert engine.generate(prompt, params)[0].outputs[0].token_ids == expected


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.7, 20)])
def test_seeded_draws_fit_transformers_softmax(temperature: float, top_k: int) -> None:
    """Chi-square over the likeliest tokens; false alarm 1e-4 each."""
    llm = LLM(str(pair.TARGET), dtype="float32")
    ids = llm.model.tokenizer.encode("import ")
    model = AutoModelForCausalLM.from_pretrained(pair.TARGET, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1] / temperature
    if top_k:
        logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    probs = logits.softmax(-1).double().numpy()
    draws = 1000
    counts = np.zeros(len(probs))
    for seed in range(draws):
        params = SamplingParams(temperature=temperature, top_k=top_k, max_tokens=1, seed=seed)
        counts[llm.generate([ids], params, speculative=False)[0].outputs[0].token_ids[0]] += 1
    order = np.argsort(-probs)
    common = order[probs[order] * draws >= 8]
    observed = np.append(counts[common], draws - counts[common].sum())
    expected = np.append(probs[common], 1 - probs[common].sum()) * draws
    if expected[-1] < 5:
        observed, expected = observed[:-1], expected[:-1] * observed[:-1].sum() / expected[:-1].sum()
    assert len(observed) > 5
    assert stats.chisquare(observed, expected).pvalue > FALSE_ALARM


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_draft_of_eight_bits_guesses_nearly_as_well_and_changes_no_token(
    llm: LLM, temperature: float
) -> None:
    config = {
        "model": str(pair.DRAFT),
        "quantization": "int8",
        "num_speculative_tokens": 12,
        "tree": {"adaptive": False, "depth": 5},
    }
    quantized = LLM(str(pair.TARGET), speculative_config=config)
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=64, ignore_eos=True)
    prompts = corpus.held_out_prompts(4)
    plain, whole, eight_bits = (
        engine.generate(prompts, params, speculative=speculative)
        for engine, speculative in ((llm, False), (llm, True), (quantized, True))
    )
    texts = [[output.outputs[0].token_ids for output in outputs] for outputs in (plain, whole, eight_bits)]
    assert texts[0] == texts[1] == texts[2]
    accepted = [
        sum(output.outputs[0].stats.num_accepted_tokens for output in outputs)
        for outputs in (whole, eight_bits)
    ]
    # Of some 200 tokens, whose drafts differ a little by chance.
    assert accepted[1] > 0.75 * accepted[0] > 0
