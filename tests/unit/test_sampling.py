"""Logit processing against a slow, obvious reference, and the choice of tokens."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from outrider.kernels.guesses import perturbed
from outrider.kernels.gumbel import exponential_noise, exponential_race, stream_keys
from outrider.speculation.errors import InvalidRequestError
from outrider.speculation.sampling import NO_TOKEN, LogitProcessor, TokenChooser, row_positions, streams_of
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.tree import DraftTree, Law
from outrider.speculation.truncation import keep_near_top, keep_top

INF = math.inf
STOPS = (0, 3)
GREEDY = SamplingParams(temperature=0)
GOLDEN = [507, 847, 269, 488]


def reference(
    logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]
) -> list[float]:
    """One row, as the documentation of each parameter reads. ``output`` includes the path."""
    x, ids = list(logits), range(len(logits))
    for t in ids:
        if params.allowed_token_ids is not None and t not in params.allowed_token_ids:
            x[t] = -INF
        if any([*output, t][-len(word) :] == list(word) for word in params.bad_words_token_ids):
            x[t] = -INF
        if len(output) < params.min_tokens and t in STOPS:
            x[t] = -INF
        x[t] += (params.logit_bias or {}).get(t, 0.0)
        if t in prompt or t in output:
            x[t] = x[t] / params.repetition_penalty if x[t] > 0 else x[t] * params.repetition_penalty
        x[t] -= params.frequency_penalty * output.count(t)
        x[t] -= params.presence_penalty * (t in output)
    if params.temperature == 0:
        return x
    x = [value / params.temperature for value in x]
    p = softmax(x)
    x = [x[t] if p[t] >= params.min_p * max(p) else -INF for t in ids]
    ranked = sorted(ids, key=lambda t: (-x[t], t))
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    x = [x[t] if t in ranked else -INF for t in ids]
    p, kept, mass = softmax(x), [], 0.0
    for t in ranked:
        if mass < params.top_p:
            kept.append(t)
        mass += p[t]
    return [x[t] if t in kept or params.top_p == 1 else -INF for t in ids]


def softmax(x: list[float]) -> list[float]:
    weights = [math.exp(value - max(x)) for value in x]
    return [weight / sum(weights) for weight in weights]


def paths(tree: DraftTree) -> list[list[int]]:
    """Tokens from the root to each row, the root's own (empty) path first."""
    found: list[list[int]] = [[]]
    for token, parent in zip(tree.tokens.tolist(), tree.parent_indices.tolist(), strict=True):
        found.append([*found[parent + 1], token])
    return found


@st.composite
def trees(draw: st.DrawFn, vocab_size: int) -> DraftTree:
    nodes = draw(st.integers(0, 8))
    tokens = draw(st.lists(st.integers(0, vocab_size - 1), min_size=nodes, max_size=nodes))
    parents = [draw(st.integers(-1, node - 1)) for node in range(nodes)]
    return DraftTree(
        tokens=np.array(tokens, np.int64),
        parent_indices=np.array(parents, np.int64),
        scores=np.ones(nodes),
        law=Law.COUPLED,
    )


@st.composite
def sampling_params(draw: st.DrawFn, vocab_size: int) -> SamplingParams:
    # Irregular values keep the masses of tied tokens off the thresholds.
    ids = st.integers(0, vocab_size - 1)
    penalties = st.sampled_from([0.0, 0.7, -1.3])
    return SamplingParams(
        temperature=draw(st.sampled_from([0, 0.5, 1, 2])),
        top_p=draw(st.sampled_from([1, 0.0131, 0.2173, 0.5071, 0.8317, 0.9911])),
        top_k=draw(st.sampled_from([0, -1, 1, 2, 5, vocab_size - 1, vocab_size, 10**6])),
        min_p=draw(st.sampled_from([0, 0.0213, 0.331, 0.9171, 1])),
        repetition_penalty=draw(st.sampled_from([1, 1.3, 0.6])),
        presence_penalty=draw(penalties),
        frequency_penalty=draw(penalties),
        max_tokens=99,
        min_tokens=draw(st.integers(0, 6)),
        seed=draw(st.integers(0, 2**64 - 1)),
        logit_bias=draw(st.none() | st.dictionaries(ids, st.sampled_from([-100, -1.5, 2, 100]), min_size=1)),
        # Two ids that do not stop, so that something is always left.
        allowed_token_ids=draw(st.none() | st.lists(ids, max_size=12).map(lambda some: [1, 2, *some])),
        bad_words_token_ids=draw(st.just([]) | st.lists(words(vocab_size), max_size=5)),
    )


def words(vocab_size: int) -> st.SearchStrategy[list[int]]:
    """Few different tokens, so that words are met; their last is never the two that are always allowed."""
    begins = st.lists(st.integers(0, min(vocab_size, 6) - 1), max_size=4)
    return st.tuples(begins, st.sampled_from([0, 3, 4, 5])).map(lambda word: [*word[0], word[1]])


@st.composite
def cases(draw: st.DrawFn) -> tuple[SamplingParams, list[int], list[list[int]], DraftTree, torch.Tensor]:
    vocab_size = draw(st.sampled_from([6, 40, 300]))
    tokens = st.lists(st.integers(0, min(vocab_size, 12) - 1), max_size=6)
    tree = draw(trees(min(vocab_size, 12)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    # A coarse grid, so that there are many ties.
    logits = torch.from_numpy(rng.integers(-12, 12, (len(tree) + 1, vocab_size)) / 4)
    return draw(sampling_params(vocab_size)), draw(tokens), draw(st.lists(tokens, max_size=3)), tree, logits


def processor(
    params: SamplingParams, prompt: list[int], commits: list[list[int]], vocab_size: int
) -> LogitProcessor:
    made = LogitProcessor(params, np.array(prompt, np.int64), vocab_size, STOPS)
    for commit in commits:
        made.commit(np.array(commit, np.int64))
    return made


@settings(deadline=None, derandomize=True, max_examples=200)
@given(cases())
def test_every_row_equals_the_reference_along_its_path(
    case: tuple[SamplingParams, list[int], list[list[int]], DraftTree, torch.Tensor],
) -> None:
    params, prompt, commits, tree, logits = case
    before = logits.clone()
    made = processor(params, prompt, commits, logits.shape[1]).process(logits, tree)
    output = [token for commit in commits for token in commit]
    for row, path in enumerate(paths(tree)):
        assert made[row].tolist() == reference(logits[row].tolist(), params, prompt, output + path)
    assert torch.equal(logits, before)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(cases())
def test_a_row_equals_plain_decoding_bit_for_bit(
    case: tuple[SamplingParams, list[int], list[list[int]], DraftTree, torch.Tensor],
) -> None:
    params, prompt, commits, tree, coarse = case
    vocab_size = coarse.shape[1]
    logits = torch.from_numpy(np.random.default_rng(3).normal(0, 3, coarse.shape)).float()
    rows = processor(params, prompt, commits, vocab_size).process(logits, tree)
    length = len(prompt) + sum(map(len, commits))
    chosen = TokenChooser(params).choose(rows, row_positions(length, tree))
    some = np.arange(0, len(rows), 2)
    part = processor(params, prompt, commits, vocab_size).process(logits[::2], tree, some)
    assert torch.equal(part, rows[::2])
    for row, path in enumerate(paths(tree)):
        plain = processor(params, prompt, [*commits, *([token] for token in path)], vocab_size)
        alone = plain.process(logits[row : row + 1], DraftTree.empty())
        assert torch.equal(alone[0], rows[row])
        token = TokenChooser(params).choose(alone, np.array([length + len(path)]))
        assert token.tolist() == [chosen[row]]


def test_penalties_count_siblings_paths_apart() -> None:
    tree = DraftTree(
        tokens=np.array([1, 2, 1]), parent_indices=np.array([-1, -1, 0]), scores=np.ones(3), law=Law.COUPLED
    )
    params = SamplingParams(frequency_penalty=1, temperature=1)
    rows = processor(params, [1, 1], [[2]], 4).process(torch.zeros(4, 4), tree)
    assert rows.tolist() == [[0, 0, -1, 0], [0, -1, -1, 0], [0, 0, -2, 0], [0, -2, -1, 0]]


def test_prompt_counts_only_for_the_repetition_penalty() -> None:
    params = SamplingParams(repetition_penalty=2, frequency_penalty=1, presence_penalty=0.5)
    logits = torch.tensor([[4.0, 4.0, -4.0, 4.0]])
    rows = processor(params, [0, 2], [[3]], 4).process(logits, DraftTree.empty())
    assert rows.tolist() == [[2, 4, -8, 0.5]]


def test_min_tokens_counts_down_along_the_path() -> None:
    params = SamplingParams(min_tokens=3, temperature=0)
    tree = DraftTree.chain([1, 1, 1], Law.COUPLED)
    made = processor(params, [], [[1]], 4)
    stopped = made.process(torch.zeros(4, 4), tree).isinf().tolist()
    assert stopped == [[True, False, False, True]] * 2 + [[False] * 4] * 2
    made.commit(np.array([1, 1]))
    assert not made.process(torch.zeros(4, 4), tree).isinf().any()


@pytest.mark.parametrize("params", [GREEDY, replace(GREEDY, top_k=2, min_p=0.5, top_p=0.1), SamplingParams()])
def test_nothing_is_copied_where_nothing_is_changed(params: SamplingParams) -> None:
    logits = torch.randn(1, 12)
    rows = processor(params, [1], [[2]], 10).process(logits, DraftTree.empty())
    assert rows.data_ptr() == logits.data_ptr()
    assert torch.equal(rows, logits[:, :10])


def test_padding_of_the_head_is_cut_off_and_low_precision_widened() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 99.0]], dtype=torch.bfloat16)
    rows = processor(SamplingParams(top_k=2, temperature=0.5), [], [], 3).process(logits, DraftTree.empty())
    assert rows.dtype == torch.float32
    assert rows.tolist() == [[-INF, 4, 6]]


def test_rows_must_fit_the_tree() -> None:
    with pytest.raises(AssertionError, match="2 rows of logits for 0 nodes"):
        processor(GREEDY, [], [], 4).process(torch.zeros(2, 4), DraftTree.empty())


def test_min_tokens_must_leave_an_allowed_token() -> None:
    with pytest.raises(InvalidRequestError, match=r"min_tokens .* not 2"):
        processor(SamplingParams(min_tokens=2, allowed_token_ids=[3]), [], [], 4)


def test_ids_must_be_in_the_vocabulary() -> None:
    with pytest.raises(InvalidRequestError, match=r"logit_bias .* not 4"):
        processor(SamplingParams(logit_bias={4: 1}), [], [], 4)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (2, 1.0, [0, 3]),
        (3, 1.0, [0, 1, 3]),
        (1, 1.0, [3]),
        (0, 1.0, [0, 1, 2, 3, 4]),
        (0, 1e-9, [3]),
        (0, 0.5, [3]),
        (0, 0.55, [0, 3]),
        (0, 0.7, [0, 1, 3]),
        # Renormalised, the first of two has 0.8 of the mass.
        (2, 0.75, [3]),
        (2, 0.85, [0, 3]),
    ],
)
def test_top_k_and_top_p_at_ties(top_k: int, top_p: float, kept: list[int]) -> None:
    logits = torch.tensor([[0.125, 0.125, 0.125, 0.5, 0.125]], dtype=torch.float64).log()
    keep_top(logits, top_k, top_p)
    assert logits[0].isfinite().nonzero()[:, 0].tolist() == kept


def test_top_p_beyond_the_first_guess_is_a_matter_of_each_row() -> None:
    flat, steep = torch.zeros(1000), -0.5 * torch.arange(1000.0)
    rows = torch.stack([flat, steep, flat])
    keep_top(rows, 0, 0.6)
    assert rows.isfinite().sum(dim=1).tolist() == [600, 2, 600]
    assert rows[0, :600].isfinite().all()


def test_top_p_cuts_the_tail_of_a_row_it_had_to_sort() -> None:
    rows = torch.log(1 + torch.arange(600.0)).expand(3, 600).clone()
    keep_top(rows, 0, 0.7)
    mass, kept = torch.arange(600, 0, -1).cumsum(0), rows.isfinite()
    size = int((mass < 0.7 * mass[-1]).sum()) + 1
    assert kept[0].nonzero()[:, 0].tolist() == list(range(600 - size, 600))
    assert bool((kept == kept[0]).all())


def test_min_p_of_one_keeps_the_ties_at_the_top() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.999]])
    keep_near_top(logits, 1.0)
    assert logits.isfinite().tolist() == [[False, True, True, False]]


def test_top_k_leaves_masked_tokens_masked() -> None:
    logits = torch.tensor([[-INF, 1.0, -INF, -INF]])
    keep_top(logits, 3, 0.9)
    assert logits.tolist() == [[-INF, 1, -INF, -INF]]


def test_positions_are_depths_below_the_length() -> None:
    tree = DraftTree(
        tokens=np.array([5, 6, 7]), parent_indices=np.array([-1, 0, -1]), scores=np.ones(3), law=Law.COUPLED
    )
    assert row_positions(10, tree).tolist() == [10, 11, 12, 11]


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    assert TokenChooser(GREEDY).choose(logits, np.array([4, 5])).tolist() == [1, 0]


def test_choices_never_change() -> None:
    """Golden values: the same seed gives the same text in every version."""
    flat = torch.zeros(4, 1000)
    chooser = TokenChooser(SamplingParams(seed=2024))
    assert chooser.choose(flat, np.arange(5, 9)).tolist() == GOLDEN
    assert chooser.choose(flat[:1], np.array([8])).tolist() == GOLDEN[3:]


def test_choice_uses_the_noise_of_its_own_position() -> None:
    """Noise off by one position would agree in about one of 50 rows."""
    logits, positions = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)), np.arange(7, 207)
    chosen = TokenChooser(SamplingParams(seed=5), choice=2).choose(logits, positions)

    def agreed(seed: int, choice: int, shift: int) -> int:
        base, gamma = torch.from_numpy(stream_keys(seed, positions + shift, choice))
        race = exponential_race(logits.softmax(1), exponential_noise(base, gamma, 50))
        return int((race.numpy() == chosen).sum())

    assert agreed(5, 2, 0) == 200
    assert max(agreed(5, 2, 1), agreed(5, 2, -1), agreed(5, 1, 0), agreed(4, 2, 0)) < 40


def test_draws_fit_the_processed_distribution() -> None:
    """Chance of a false alarm, were the seed not fixed: 1e-6."""
    params = SamplingParams(seed=1, temperature=0.7, top_k=5)
    logits = torch.tensor([[0.1, 1.0, -1.0, 2.0, 0.3, 0.2, 1.5]])
    rows = processor(params, [], [], 7).process(logits, DraftTree.empty()).expand(50_000, 7)
    counts = Counter(TokenChooser(params).choose(rows, np.arange(50_000)).tolist())
    p = np.array(softmax(reference(logits[0].tolist(), params, [], [])))
    assert set(counts) == set(p.nonzero()[0])
    assert stats.chisquare([counts[t] for t in p.nonzero()[0]], p[p > 0] * 50_000).pvalue > 1e-6


@pytest.mark.parametrize("vocab_size", [13, 4099])
@pytest.mark.parametrize("temperature", [0, 1])
def test_choice_is_the_same_in_any_batch(vocab_size: int, temperature: float) -> None:
    chooser = TokenChooser(SamplingParams(temperature=temperature, seed=8))
    logits = torch.randn(9, vocab_size, generator=torch.Generator().manual_seed(1))
    positions = np.arange(30, 39)
    together = chooser.choose(logits, positions).tolist()
    alone = [int(chooser.choose(logits[r : r + 1], positions[r : r + 1])[0]) for r in range(9)]
    assert together == alone


def test_perturbed_scores_put_the_choice_first() -> None:
    chooser = TokenChooser(SamplingParams(seed=8))
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(2))
    positions = np.arange(64)
    scores = perturbed(logits, streams_of([chooser], [positions]))
    assert scores.argmax(1).tolist() == chooser.choose(logits, positions).tolist()
    base, gamma = torch.from_numpy(stream_keys(8, positions, 0))
    torch.testing.assert_close(scores * exponential_noise(base, gamma, 300), logits.softmax(1))


def test_perturbed_scores_at_temperature_zero_are_probabilities() -> None:
    logits = torch.randn(2, 5)
    assert torch.equal(
        perturbed(logits, streams_of([TokenChooser(GREEDY)], [np.arange(2)])), logits.softmax(1)
    )


def test_sampling_needs_a_seed() -> None:
    with pytest.raises(InvalidRequestError, match=r"seed must be set at temperature 0\.5, not None"):
        TokenChooser(SamplingParams(temperature=0.5))


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize(
    "cut", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.2}, {"top_k": 3, "top_p": 0.9}]
)
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_broken_logits_have_no_token(bad: float, cut: dict[str, float], temperature: float) -> None:
    params = SamplingParams(seed=1, temperature=temperature, repetition_penalty=1.1, **cut)  # type: ignore[arg-type]
    for token in range(6):
        logits = torch.randn(3, 6)
        logits[1, token] = bad
        rows = processor(params, [1], [], 6).process(logits, DraftTree.chain([1, 1], Law.COUPLED))
        chosen = TokenChooser(params).choose(rows, np.array([70, 71, 72]))
        assert (chosen == NO_TOKEN).tolist() == [False, True, False]


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_row_without_tokens_has_no_token(temperature: float) -> None:
    chooser = TokenChooser(SamplingParams(seed=1, temperature=temperature))
    assert chooser.choose(torch.full((1, 4), -INF), np.array([3])).tolist() == [NO_TOKEN]
