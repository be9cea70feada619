"""Checks on TableLM. Each returns when the engine is right and raises AssertionError when not.

Tests call them on the engine as it is; ``unit/test_mutations.py`` calls them on engines that
were broken on purpose, so none of them can pass idly.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from instruments import drafters
from instruments.drafters import Growing, Scripted
from instruments.enumeration import SharedNoise, coupled_guess, distance, exact_law
from instruments.serving import EOS, Outcome, serve, table_engine
from instruments.table_lm import TableLM
from outrider.actors.drafting import DraftEngine
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.tree import ROOT

GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(temperature=1.0, seed=11)
PROMPT = [1, 2, 3]
LAW_TOKENS = 3
ANSWER_SEEDS = range(6)
CYCLE = [7, 2, 3, 4, 5, 6, EOS, 1]
"""b c d e f g a(EOS) h b c ..."""

ANSWERS: dict[str, dict[str, Any]] = {
    "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 0.4},
    "greedy with min_tokens": {"temperature": 0.0, "min_tokens": 9, "stop_token_ids": (2, 3, 5)},
    "penalties": {"presence_penalty": 0.8, "frequency_penalty": 0.6, "repetition_penalty": 1.2},
    "truncation": {"temperature": 0.7, "top_p": 0.8, "top_k": 4, "min_p": 0.05},
    "stop ids": {"stop_token_ids": (4, 5), "min_tokens": 6, "frequency_penalty": 0.5},
    "stop strings": {"stop": ("db", "cc", "e"), "min_tokens": 2},
    "stop string included": {"stop": ("bd", "cf"), "include_stop_str_in_output": True},
    "bias and allowed": {"logit_bias": {2: 1.5, EOS: -3.0}, "allowed_token_ids": (0, 1, 2, 3)},
    "bad words": {"bad_words_token_ids": ((2, 3), (3,), (5, 4, 2), (6, 1))},
    "ignore_eos": {"ignore_eos": True, "frequency_penalty": -0.5},
}
"""Sampling parameters under which drafting must not show; each gives outputs of six tokens and more."""


def drafter_zoo(truth: Sequence[int], gamma: int, vocab_size: int) -> dict[str, DraftEngine]:
    """Drafters of every kind. truth: prompt and plain output, longer than what is asked for."""
    right = drafters.perfect(truth, gamma)
    mixed = drafters.partly_right(truth, gamma + 1, 3 * gamma, vocab_size, 1)
    noise = drafters.junk(3 * gamma, vocab_size, 2)
    return {
        "perfect": Scripted(right),
        "always wrong": Scripted(drafters.always_wrong(truth, gamma, vocab_size)),
        "partly right": Scripted(mixed),
        "junk": Scripted(noise),
        "permuted": Scripted(drafters.shuffled(mixed, 3)),
        "wrong parents": Scripted(drafters.wrong_parents(truth, vocab_size)),
        "EOS everywhere": Scripted(drafters.with_token_inside(right, EOS)),
        "endless": Growing(drafters.endless(vocab_size)),
        "zero scores": Growing(drafters.zero_scores(vocab_size), capacity=12),
        "living": Growing(drafters.levelwise(lambda text: [*truth[len(text) : len(text) + 1], 1, 2])),
    }


def check_law(kind: str, gamma: int, params: SamplingParams | None = None) -> None:
    """The law of the first three tokens under speculation, by enumeration, to 1e-10.

    Without ``params`` it is compared with the products of the table's own probabilities,
    otherwise with the enumerated law of plain decoding.
    """
    target = TableLM.random(1, vocab_size=3, order=2)
    draft = TableLM.random(2, vocab_size=3)
    served = replace(params or SamplingParams(), seed=0, max_tokens=LAW_TOKENS)

    def speculative(noise: SharedNoise) -> list[int]:
        drafting = law_drafter(kind, gamma, draft, noise)
        return serve(table_engine(target, drafting, budget=24), PROMPT[:2], served).token_ids

    def plain(_: SharedNoise) -> list[int]:
        return serve(table_engine(target), PROMPT[:2], served).token_ids

    horizon = 2 + LAW_TOKENS
    expected = exact_law(plain, horizon=horizon) if params else target.joint_law(PROMPT[:2], LAW_TOKENS)
    law = exact_law(speculative, horizon=horizon)
    assert abs(sum(law.values()) - 1.0) < 1e-10
    assert distance(law, expected) < 1e-10, f"the law is off by {distance(law, expected)}"


LAW_DRAFTERS = ("coupled chain", "fixed chain", "tree", "junk")


def law_drafter(kind: str, gamma: int, draft: TableLM, noise: SharedNoise) -> DraftEngine:
    """Drafters that know the very noise of the target, or do not; trees and chains."""

    def coupled(text: list[int]) -> drafters.DraftTree:
        tokens: list[int] = []
        for _ in range(gamma):
            tokens.append(coupled_guess(draft, noise, text + tokens))
        return drafters.chain(tokens)

    def tree(text: list[int]) -> drafters.DraftTree:
        chain = coupled(text)
        rng = np.random.default_rng(len(text))
        return drafters.permuted(drafters.grafted(chain, drafters.junk(4, 3, 5)(text), rng), rng)

    kinds = {
        "coupled chain": coupled,
        "fixed chain": lambda text: drafters.chain(draft.greedy(text, gamma)),
        "tree": tree,
        "junk": drafters.junk(2 * gamma, 3, 7),
    }
    return Scripted(kinds[kind])


def check_identity(params: SamplingParams, gamma: int) -> None:
    """For every max_tokens from 1 to 3 gamma and every drafter: exactly plain decoding's tokens.

    The truth is computed from the table by definition, without the engine.
    """
    lm = TableLM.random(3, vocab_size=5, order=2)
    count = 3 * gamma
    more = count + gamma + 1
    plain = lm.greedy(PROMPT, more) if params.is_greedy else lm.sampled(PROMPT, more, params.seed or 0)
    for name, drafting in drafter_zoo(PROMPT + plain, gamma, lm.vocab_size).items():
        for max_tokens in range(1, count + 1):
            engine = table_engine(lm, drafting, budget=63, depth=3)
            outcome = serve(engine, PROMPT, replace(params, max_tokens=max_tokens))
            assert outcome.token_ids == plain[:max_tokens], f"{name}, {max_tokens} tokens"
            assert outcome.finish_reason == "length"
            assert outcome.streamed == outcome.text == letters(outcome.token_ids)
    assert all(sequence.closed for sequence in lm.sequences)


def check_answers(name: str, *, lag: int = 0) -> None:
    """Under these sampling parameters every drafter leaves plain decoding's answer as it is."""
    lm = TableLM.random(5, vocab_size=8, spread=1.0)
    lm.logits[:, EOS] -= 1.0
    lengths = []
    for seed in ANSWER_SEEDS:
        params = SamplingParams(max_tokens=18, seed=seed, **ANSWERS[name])
        plain = serve(table_engine(lm, eos_ids=(EOS,), lag=lag), PROMPT, params)
        lengths.append(len(plain.token_ids))
        truth = PROMPT + plain.token_ids + [1, 2, 3, 4]
        for drafter, drafting in drafter_zoo(truth, 3, lm.vocab_size).items():
            engine = table_engine(lm, drafting, budget=63, depth=3, eos_ids=(EOS,), lag=lag)
            outcome = serve(engine, PROMPT, params)
            assert outcome.answer == plain.answer, f"{drafter}, seed {seed}"
            assert outcome.streamed == outcome.text
    assert max(lengths) >= 6, f"outputs of {lengths} tokens say little"


def check_eos() -> set[str]:
    """Output ends with the first committed EOS wherever a window has it; returns which places these were."""
    lm = TableLM.cycle(CYCLE)
    params = replace(GREEDY, max_tokens=12)
    seen: set[str] = set()
    for gamma in range(1, 6):
        for start in (EOS, 1, 2, 3, 4, 5, 6):
            prompt = [7, start]
            plain = lm.greedy(prompt, 20)
            expected = plain[: plain.index(EOS) + 1]
            for name, drafting in drafter_zoo(prompt + plain, gamma, lm.vocab_size).items():
                outcome = serve(table_engine(lm, drafting, budget=63, eos_ids=(EOS,)), prompt, params)
                case = f"{name}, {gamma} drafted, EOS after {len(expected)}"
                assert outcome.token_ids == expected, case
                assert (outcome.finish_reason, outcome.stop_reason) == ("stop", None), case
                assert outcome.streamed == outcome.text == letters(expected[:-1]), case
                seen |= {where_it_ended(outcome, gamma)}
                if name == "EOS everywhere" and len(expected) > 1:
                    seen |= {"rejected sibling"}
    return seen


def where_it_ended(outcome: Outcome, gamma: int) -> str:
    last = outcome.steps[-1]
    if last.num_accepted < len(last.token_ids):
        return "bonus" if last.num_accepted == gamma else "recovered"
    kept = sum(step.num_accepted for step in outcome.steps)
    return "inside" if outcome.stats.num_accepted_tokens > kept else "window edge"


def check_stop_strings(lag: int = 0) -> None:
    """Every stop string of two or three letters in the text, at every offset within the windows."""
    lm = TableLM.cycle(CYCLE)
    prompt = [7, 1]
    plain = lm.greedy(prompt, 24)
    text = letters(plain)
    for gamma in range(1, 5):
        for start in range(8):
            for length in (2, 3):
                stop = text[start : start + length]
                params = replace(GREEDY, max_tokens=16, stop=(stop,), ignore_eos=True)
                reference = serve(table_engine(lm, lag=lag), prompt, params)
                assert reference.text == text[:start]
                assert len(reference.token_ids) == min(16, start + length + lag)
                for name, drafting in drafter_zoo(prompt + plain, gamma, lm.vocab_size).items():
                    outcome = serve(table_engine(lm, drafting, budget=63, lag=lag), prompt, params)
                    assert outcome.answer == reference.answer, f"{name}, {gamma} drafted, {stop!r}"
                    assert outcome.stop_reason == stop
                    assert outcome.streamed == outcome.text


def check_forward_counts(gamma: int) -> None:
    """A perfect drafter takes one forward per window, one that is always wrong plain decoding's number."""
    count = 13
    plain_lm = TableLM.random(3, vocab_size=5, order=2)
    params = replace(SEEDED, max_tokens=count)
    plain = serve(table_engine(plain_lm), PROMPT, params)
    assert plain_lm.forwards == plain_lm.rows == count
    truth = PROMPT + plain_lm.sampled(PROMPT, count + gamma + 1, 11)

    for right in (True, False):
        lm = TableLM(plain_lm.logits)
        propose = (
            drafters.perfect(truth, gamma) if right else drafters.always_wrong(truth, gamma, lm.vocab_size)
        )
        outcome = serve(table_engine(lm, Scripted(propose), budget=gamma), PROMPT, params)
        stats = outcome.stats
        assert outcome.token_ids == plain.token_ids
        assert lm.forwards == stats.target_steps == len(outcome.steps)
        assert lm.forwards == (math.ceil(count / (gamma + 1)) if right else count)
        assert lm.rows == stats.target_rows == lm.forwards + stats.num_draft_tokens
        assert stats.num_draft_tokens > 0
        assert stats.num_accepted_tokens == (stats.num_draft_tokens if right else 0)
        assert stats.num_output_tokens == count


def check_closing() -> None:
    """Closing frees everything, half-way too, and drafters hear of it."""
    lm = TableLM.random(3, vocab_size=5)
    for steps in range(3):
        drafting = Scripted(drafters.junk(4, 5, 0))
        with table_engine(lm, drafting).start(request_of(PROMPT, SEEDED)) as run:
            for _ in range(steps):
                run.step()
        assert run.finished
        assert all(sequence.closed for sequence in lm.sequences)
        assert [session.closed for session in drafting.sessions] == [True] * min(1, steps)


def request_of(prompt: Sequence[int], params: SamplingParams) -> "drafters.Request":
    return drafters.Request(prompt_ids=np.array(prompt, np.int64), params=params)


def letters(tokens: Sequence[int]) -> str:
    return "".join(chr(ord("a") + token) for token in tokens)


def paths_of(tree: drafters.DraftTree) -> Iterator[tuple[int, ...]]:
    """Each node's tokens from the root downwards."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parent_indices.tolist(), strict=True):
        paths.append((token,) if parent == ROOT else (*paths[parent], token))
    return iter(paths)
