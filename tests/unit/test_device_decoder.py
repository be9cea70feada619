"""Whole networks with the kernels of devices, in Triton's interpreter, against the same on CPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")

from forwards import bushy_tree, make_runner, opened, random_ids
from instruments import drafters, interpreted
from instruments.cuda_stand_in import rerun
from instruments.model_checks import model_engine
from instruments.serving import serve

from outrider.actors.model_runner import ModelRunner
from outrider.actors.runner import TreeQuery
from outrider.kernels import gumbel
from outrider.kernels.guesses import perturbed
from outrider.models import cuda_graphs
from outrider.models.config import load_config
from outrider.models.decoder import Decoder
from outrider.models.kernel_set import Capture, Run
from outrider.models.kv_cache import KVSequence
from outrider.models.numerics import Numerics
from outrider.models.triton_set import triton_set
from outrider.models.weights import Checkpoint
from outrider.speculation.sampling import NO_TOKEN, TokenChooser, choose_together, streams_of
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.tree import DraftTree

CONTEXT = 128
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
}
MODELS = {
    "llama": SMALL,
    # Norms of queries and keys, and heads of a size that is no power of two.
    "qwen3": {**SMALL, "head_dim": 20, "num_attention_heads": 3},
    "mistral": {**SMALL, "sliding_window": 4},
}


@pytest.fixture(autouse=True)
def _as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    interpreted.repair(monkeypatch)
    with np.errstate(all="ignore"):
        yield


def device_runner(
    folder: Path,
    numerics: Numerics,
    *,
    dtype: torch.dtype = torch.float32,
    capture: Capture | None = None,
) -> ModelRunner:
    decoder = Decoder(
        load_config(folder),
        Checkpoint(folder),
        dtype=dtype,
        numerics=numerics,
        max_model_len=CONTEXT,
        kernels=triton_set(capture=capture),
    )
    return ModelRunner(decoder, num_blocks=24)


def query(runner: ModelRunner, source: ModelRunner, index: int) -> TreeQuery[KVSequence]:
    """The last token of a prompt and what is drafted below it, or, without a tree, its last two tokens.

    source: a runner on CPU, which computes what is cached of the prompt.
    """
    prompt, tree = PROMPTS[index], TREES[index]
    rows = 2 if tree is None else 1
    cached = opened(source, prompt[:-rows])
    sequence = KVSequence(runner.cache)
    sequence.reserve(len(prompt) + 10)
    sequence.length = cached.length
    runner.cache.pool[:, sequence.slots(0, sequence.length)] = kv(source, cached)
    cached.close()
    return TreeQuery(sequence=sequence, tokens=prompt[-rows:], tree=tree)


def kv(runner: ModelRunner, sequence: KVSequence) -> torch.Tensor:
    return runner.cache.pool[:, sequence.slots(0, sequence.length)]


PROMPTS = [random_ids(31), random_ids(5, seed=1), random_ids(45, seed=2), random_ids(12, seed=3)]
TREES = [
    bushy_tree(random_ids(3, seed=4), junk=1)[0],
    DraftTree.empty(),
    None,
    bushy_tree(random_ids(5), junk=0)[0],
]
"""A tree that crosses a block's end, plain decoding, a piece of a prompt, a chain longer than the window."""
EVERYTHING = range(len(PROMPTS))


@pytest.mark.parametrize("numerics", [Numerics.CANONICAL, Numerics.FAST])
@pytest.mark.parametrize("family", MODELS)
def test_logits_and_kv_are_those_on_cpu(
    family: str, numerics: Numerics, make_model_folder: Callable[..., Path]
) -> None:
    folder = make_model_folder(family, **MODELS[family])
    here, there = make_runner(folder, num_sequences=5), device_runner(folder, numerics)
    results = []
    for runner in (here, there):
        asked = [query(runner, here, index) for index in EVERYTHING]
        logits = runner.verify(asked)
        # A path of the tree becomes text, for which entries have to move up.
        runner.accept(asked[0].sequence, np.array([1, 3]))
        runner.accept(asked[3].sequence, np.array([0]))
        results.append([*logits, *(kv(runner, each.sequence) for each in asked)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_canonical_rows_have_the_same_bits_in_any_company(
    family: str, make_model_folder: Callable[..., Path]
) -> None:
    folder = make_model_folder(family, **MODELS[family])
    source, runner = make_runner(folder), device_runner(folder, Numerics.CANONICAL)
    together = runner.verify(asked := [query(runner, source, index) for index in EVERYTHING])
    for index in EVERYTHING[1:]:
        alone = query(runner, source, index)
        assert torch.equal(runner.verify([alone])[0], together[index])
        assert torch.equal(kv(runner, alone.sequence), kv(runner, asked[index].sequence))
    # The last path of the tree, decoded token by token.
    sequence, tree = query(runner, source, 0).sequence, TREES[0]
    assert tree is not None
    path = tree.ancestor_mask[-1].nonzero()[0]
    tokens = [PROMPTS[0][-1], *tree.tokens[path]]
    for token, row in zip(tokens, [0, *(1 + path)], strict=True):
        alone = TreeQuery(sequence=sequence, tokens=np.array([token]), tree=DraftTree.empty())
        assert torch.equal(runner.verify([alone])[0][0], together[0][row])


@pytest.mark.parametrize("numerics", Numerics)
def test_captured_steps_give_what_others_give(
    numerics: Numerics, make_model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    replays = 0

    def counted(run: Run) -> tuple[Callable[[], None], torch.Tensor]:
        replay, result = rerun(run)

        def counting() -> None:
            nonlocal replays
            replays += 1
            replay()

        return counting, result

    monkeypatch.setattr(cuda_graphs, "ROWS", (2, 16))
    folder = make_model_folder("mistral", **MODELS["mistral"], num_hidden_layers=1)
    source, eager = make_runner(folder), device_runner(folder, numerics)
    captured = device_runner(folder, numerics, capture=counted)
    results = []
    for runner in (eager, captured):
        asked = [query(runner, source, index) for index in EVERYTHING]
        results.append([*runner.verify(asked), *(kv(runner, each.sequence) for each in asked)])
    assert replays == 1
    for got, expected in zip(results[1], results[0], strict=True):
        if numerics is Numerics.CANONICAL:
            assert torch.equal(got, expected)
        else:
            # Tiles of another size add up in another order.
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_tokens_are_chosen_on_a_device_as_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = 4 * torch.randn(7, 1500, generator=torch.Generator().manual_seed(1))
    logits[1, 3], logits[5, 700] = torch.nan, torch.nan
    logits[2, 5:] = -torch.inf
    params = [
        SamplingParams(temperature=1.0, seed=5),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0, seed=2**63),
    ]
    choosers = [TokenChooser(each, choice) for choice, each in enumerate(params)]
    positions = [np.array([8, 9, 9]), np.array([3]), np.array([20, 21, 20])]
    chosen = choose_together(choosers, logits, positions)
    ranked = perturbed(logits, streams_of(choosers, positions))
    monkeypatch.setattr(gumbel, "on_device", lambda _: True)
    launched: list[str] = []
    for name in ("draw", "exponential_noise"):
        monkeypatch.setattr(gumbel._kernels(), name, _noted(launched, getattr(gumbel._kernels(), name)))
    for got, expected in zip(choose_together(choosers, logits, positions), chosen, strict=True):
        assert got.tolist() == expected.tolist()
    again = perturbed(logits, streams_of(choosers, positions))
    torch.testing.assert_close(again, ranked, rtol=0, atol=0, equal_nan=True)
    assert chosen[0][1] == chosen[2][1] == NO_TOKEN
    assert launched == ["draw", "exponential_noise"]


def _noted(names: list[str], kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def call(*args: Any) -> torch.Tensor:
        names.append(kernel.__name__)
        return kernel(*args)

    return call


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_engine_writes_the_same_text(
    temperature: float, make_model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model_folder("llama", **SMALL)
    params = SamplingParams(
        temperature=temperature, seed=7, max_tokens=6, repetition_penalty=1.1, logit_bias={5: 1.0}, top_k=40
    )
    prompt = [5, 17, 101]
    plain = serve(model_engine(make_runner(folder), None), prompt, params).token_ids
    monkeypatch.setattr(gumbel, "on_device", lambda _: True)
    scripted = drafters.Scripted(drafters.partly_right([*prompt, *plain, 1, 1, 1], 3, 4, 300, 3))
    outcome = serve(model_engine(device_runner(folder, Numerics.FAST), scripted, depth=3), prompt, params)
    assert outcome.token_ids == plain
    assert outcome.stats.num_accepted_tokens > 0
