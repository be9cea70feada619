"""Prompt lookup against brute-force search, and its cost on copied text."""

import math
import time

import numpy as np
import pytest

from outrider.speculation.drafters.ngram import LOOKBACK, NgramDrafter
from outrider.speculation.errors import InvalidConfigError
from outrider.speculation.tree import Law
from outrider.speculation.types import Drafter
from outrider.speculation.verifiers.registry import make_verifier


def earlier_ends(text: list[int], shortest: int, longest: int) -> tuple[int, list[int]]:
    """The longest suffix that occurred before, and where it ended, most recent first."""
    for n in range(min(longest, len(text) - 1), shortest - 1, -1):
        ends = [end for end in range(len(text) - 1, n - 1, -1) if text[end - n : end] == text[-n:]]
        if ends:
            return n, ends
    return 0, []


def expected_paths(text: list[int], drafter: dict[str, int], budget: int) -> list[tuple[int, ...]]:
    """Paths in the order in which nodes are added."""
    depth = min(drafter["num_speculative_tokens"], budget)
    _, ends = earlier_ends(text, drafter["prompt_lookup_min"], drafter["prompt_lookup_max"])
    paths: list[tuple[int, ...]] = []
    branches = 0
    for end in ends[:LOOKBACK]:
        ahead = text[end : end + depth]
        new = [tuple(ahead[: n + 1]) for n in range(len(ahead))]
        new = [path for path in new if path not in paths]
        paths += new
        branches += bool(new)
        if branches == drafter["branches"]:
            break
    return paths[:budget]


SETTINGS = [
    {"prompt_lookup_min": 1, "prompt_lookup_max": 1, "num_speculative_tokens": 3, "branches": 1},
    {"prompt_lookup_min": 2, "prompt_lookup_max": 4, "num_speculative_tokens": 5, "branches": 1},
    {"prompt_lookup_min": 1, "prompt_lookup_max": 3, "num_speculative_tokens": 4, "branches": 3},
    {"prompt_lookup_min": 3, "prompt_lookup_max": 3, "num_speculative_tokens": 10, "branches": 2},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("vocabulary", [2, 5])
def test_every_step_equals_brute_force(settings: dict[str, int], vocabulary: int) -> None:
    rng = np.random.default_rng(3)
    text: list[int] = rng.integers(0, vocabulary, 3).tolist()
    drafter, drafted = NgramDrafter(**settings), 0
    while len(text) < 160:
        budget = int(rng.integers(0, 13))
        tree = drafter.propose(np.array(text), budget)
        assert tree.law is Law.DETERMINISTIC
        paths: list[tuple[int, ...]] = []
        for token, parent in zip(tree.tokens.tolist(), tree.parent_indices.tolist(), strict=True):
            paths.append((*paths[parent], token) if parent >= 0 else (token,))
        assert paths == expected_paths(text, settings, budget)
        drafted += len(paths)
        text += rng.integers(0, vocabulary, rng.integers(1, 5)).tolist()
    assert drafted > 50


def test_the_longest_match_wins_over_the_most_recent_one() -> None:
    text = [1, 2, 3, 7, 9, 3, 8, 1, 2, 3]
    drafter = NgramDrafter(prompt_lookup_min=1, prompt_lookup_max=3, num_speculative_tokens=2)
    assert drafter.propose(np.array(text), 2).tokens.tolist() == [7, 9]
    short = NgramDrafter(prompt_lookup_min=1, prompt_lookup_max=1, num_speculative_tokens=2)
    assert short.propose(np.array(text), 2).tokens.tolist() == [8, 1]


def test_scores_fall_along_the_path_and_with_age_and_rise_with_the_match() -> None:
    settings = {"prompt_lookup_min": 1, "prompt_lookup_max": 2, "num_speculative_tokens": 2}
    tree = NgramDrafter(**settings, branches=2).propose(np.array([1, 5, 6, 1, 7, 8, 1]), 9)
    assert tree.tokens.tolist() == [7, 8, 5, 6]
    assert tree.parent_indices.tolist() == [-1, 0, -1, 2]
    assert tree.scores.tolist() == [0.5, 0.375, 0.25, 0.1875]
    longer = NgramDrafter(**settings).propose(np.array([1, 2, 7, 8, 1, 2]), 9)
    assert longer.tokens.tolist() == [7, 8]
    assert longer.scores.tolist() == [0.75, 0.75 * 0.875]


@pytest.mark.parametrize("change", ["shorter", "other", "empty", "unrelated"])
def test_another_text_rebuilds_the_index(change: str) -> None:
    first = np.array([1, 2, 3, 4, 1, 2, 3, 9, 1, 2])
    other = {
        "shorter": first[:6],
        "other": np.array([1, 2, 8, 4, 1, 2, 3, 9, 1, 2, 1, 2]),
        "empty": first[:0],
        "unrelated": np.array([4, 4, 4]),
    }[change]
    settings = {"prompt_lookup_min": 1, "prompt_lookup_max": 3, "num_speculative_tokens": 4}
    used, fresh = NgramDrafter(**settings), NgramDrafter(**settings)
    assert used.propose(first, 4).tokens.tolist() == [3, 9, 1, 2]
    tree = used.propose(other, 4)
    assert tree.tokens.tolist() == fresh.propose(other, 4).tokens.tolist()
    assert tree.tokens.tolist() == {"shorter": [3, 4, 1, 2], "unrelated": [4]}.get(
        change, tree.tokens.tolist()
    )


def test_a_text_changed_in_place_by_the_caller_is_noticed() -> None:
    text = np.array([1, 2, 3, 1, 2])
    drafter = NgramDrafter(prompt_lookup_min=2, prompt_lookup_max=2, num_speculative_tokens=1)
    assert drafter.propose(text, 1).tokens.tolist() == [3]
    text[0] = 7
    assert drafter.propose(text, 1).tokens.tolist() == [], "the index of the old text would say 3"


@pytest.mark.parametrize(("length", "gamma", "calls"), [(50, 3, 8), (100, 3, 12), (50, 5, 10)])
def test_regenerating_a_span_costs_what_the_formula_says(length: int, gamma: int, calls: int) -> None:
    """Gamma plain steps until a gamma-gram matches, then m + 1 tokens per step (CopySpec's count, m = 10).

    CopySpec's figures are for the first occurrence. The most recent one costs the same: the
    copy in the making is no earlier occurrence of its own last gamma tokens.
    """
    m, span = 10, list(range(100, 100 + length))
    truth = [*span, 1, 2, 3, *span, 0]
    committed = length + 3
    drafter: Drafter = NgramDrafter(
        prompt_lookup_min=gamma, prompt_lookup_max=gamma, num_speculative_tokens=m
    )
    used = 0
    while committed < 2 * length + 3:
        left = 2 * length + 3 - committed
        tree = drafter.propose(np.array(truth[:committed]), min(m, left - 1))
        ahead = np.array(truth[committed : committed + len(tree) + 1])
        verdict = make_verifier("greedy").verify(tree, ahead)
        assert verdict.num_accepted_tokens == len(tree)
        committed += len(tree) + 1
        used += 1
    assert used == calls == gamma + math.ceil((length - gamma) / (m + 1))


def test_a_step_does_not_rescan_the_context() -> None:
    """100 steps at 60,000 tokens: rescanning in Python takes far over 1 s, the index 10 ms."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, 50, 60_200)
    drafter = NgramDrafter(prompt_lookup_min=2, prompt_lookup_max=4, num_speculative_tokens=5, branches=4)
    drafter.propose(text[:60_000], 16)
    started = time.perf_counter()
    for step in range(100):
        assert len(drafter.propose(text[: 60_000 + 2 * step], 16))
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_lookup_min": 0}, "prompt_lookup_min 0"),
        ({"prompt_lookup_min": 5, "prompt_lookup_max": 4}, "prompt_lookup_min 5 .* prompt_lookup_max 4"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens 0"),
        ({"num_speculative_tokens": 33}, "num_speculative_tokens 33"),
        ({"branches": 0}, "branches 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        NgramDrafter(**settings)
