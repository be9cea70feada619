"""A decoder's step in one native call: the bits of its parts one after the other."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from forwards import bushy_tree, make_runner, opened, random_ids

from outrider.actors.model_runner import ModelRunner
from outrider.actors.runner import TreeQuery
from outrider.kernels.int8_linear import Int8Linear
from outrider.kernels.layer_stack import Ends, LayerStack, LayerWeights
from outrider.kernels.linear import Linear
from outrider.kernels.native import library
from outrider.kernels.path_attention import PathAttention, PathKeys
from outrider.models.config import load_config
from outrider.models.decoder import Decoder
from outrider.models.numerics import Numerics
from outrider.models.weights import Checkpoint

LINEARS, LAYERS = library.load(), library.layers(torch.empty(0))
DTYPES = [torch.float32, torch.bfloat16]
HIDDEN, INNER, H, G, D, VOCAB = 24, 40, 4, 2, 6, 9

pytestmark = pytest.mark.skipif(
    LINEARS is None or LAYERS is None, reason="the native modules are not built or are switched off"
)

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # Heads in groups of three, sizes that fill no vector register, biases everywhere.
    "biases": (
        "llama",
        {
            "hidden_size": 60,
            "intermediate_size": 100,
            "num_attention_heads": 6,
            "head_dim": 20,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "norms of heads": ("qwen3", {"head_dim": 16}),
    "a window that slides": ("mistral", {"sliding_window": 16}),
}


def answers(runner: ModelRunner) -> list[torch.Tensor]:
    """Logits of a forward over two texts, one with a tree below it, and their keys and values afterwards."""
    texts = [opened(runner, random_ids(length)) for length in (37, 5)]
    trees = (bushy_tree(random_ids(4), junk=2)[0], None)
    queries = [
        TreeQuery(sequence=text, tokens=random_ids(3), tree=tree)
        for text, tree in zip(texts, trees, strict=True)
    ]
    for query in queries:
        assert query.sequence.reserve(query.sequence.length + 3 + 12)
    got = runner.verify(queries)
    entries = [runner.cache.pool[:, torch.from_numpy(text.slots(0, text.room))] for text in texts]
    for text in texts:
        text.close()
    return [*got, *entries]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_bits_are_those_of_the_blocks(name: str, dtype: torch.dtype, make_model_folder: Any) -> None:
    family, shape = MODELS[name]
    folder = make_model_folder(family, **shape)
    before = LINEARS.selected(), LAYERS.selected()
    try:
        for first in LINEARS.paths():
            LINEARS.select(first)
            runner = make_runner(folder, dtype, num_sequences=2)
            decoder = runner.decoder
            assert isinstance(decoder, Decoder)
            stack = decoder.stack
            assert stack is not None
            for second, threads in itertools.product(LAYERS.paths(), (1, 2)):
                LAYERS.select(second)
                torch.set_num_threads(threads)
                results = []
                for decoder.stack in (stack, None):
                    runner.cache.pool.zero_()
                    results.append(answers(runner))
                for ours, theirs in zip(*results, strict=True):
                    assert torch.equal(ours, theirs), (first, second, threads)
    finally:
        LINEARS.select(before[0])
        LAYERS.select(before[1])


def test_weights_of_eight_bits_are_stacked_too(make_model_folder: Any) -> None:
    folder = make_model_folder("llama")
    decoder = Decoder(
        load_config(folder),
        Checkpoint(folder),
        dtype=torch.bfloat16,
        numerics=Numerics.CANONICAL,
        max_model_len=128,
        quantization="int8",
    )
    stack, runner = decoder.stack, ModelRunner(decoder, num_blocks=8)
    assert stack is not None
    ours = answers(runner)
    decoder.stack = None
    runner.cache.pool.zero_()
    for mine, theirs in zip(ours, answers(runner), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("module", ["_load_layers", "load"])
def test_without_a_module_blocks_run_one_after_the_other(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = layer(torch.float32)
    monkeypatch.setattr(library, module, lambda: None)
    without = replace(weights, down=Linear(torch.ones(HIDDEN, INNER)))
    assert LayerStack.of([without], ends(torch.float32), 1e-5) is None


def test_one_layer_that_is_not_native_leaves_them_all_apart() -> None:
    weights = layer(torch.float32)
    other = layer(torch.float32)
    other.down.native = None
    both = ends(torch.float32)
    assert LayerStack.of([weights], both, 1e-5) is not None
    assert LayerStack.of([weights, other], both, 1e-5) is None
    both.head.native = None
    assert LayerStack.of([weights], both, 1e-5) is None


def layer(dtype: torch.dtype, *, hidden: int = HIDDEN, kind: type[Linear] = Linear) -> LayerWeights:
    def linear(outs: int, ins: int) -> Linear:
        return kind(torch.ones(outs, ins, dtype=dtype))

    return LayerWeights(
        input_norm=torch.ones(hidden, dtype=dtype),
        qkv=linear((H + 2 * G) * D, hidden),
        qk_norm=None,
        output=linear(hidden, H * D),
        post_norm=torch.ones(hidden, dtype=dtype),
        gate_up=linear(2 * INNER, hidden),
        down=linear(hidden, INNER),
    )


def ends(dtype: torch.dtype, *, hidden: int = HIDDEN) -> Ends:
    table = torch.arange(VOCAB, dtype=dtype)[:, None] + torch.arange(hidden, dtype=dtype)
    return Ends(embedding=table, norm=torch.ones(hidden, dtype=dtype), head=Linear(table))


def attention(heads: int = H) -> PathAttention:
    """Of one row that attends itself."""
    zero = np.zeros(1, np.int64)
    keys = PathKeys(
        tables=zero,
        table_starts=zero,
        first=zero,
        seen=zero + 1,
        nodes=zero[:0],
        node_starts=np.zeros(2, np.int64),
    )
    turns = torch.ones(1, 2, D // 2, dtype=torch.complex64)
    at = torch.zeros(1, dtype=torch.int64)
    return PathAttention(LAYERS, keys, turns=turns, positions=at, slots=at, shape=(heads, G, D), block=4)


def test_what_does_not_fit_is_refused() -> None:
    good, both = layer(torch.float32), ends(torch.float32)
    for wrong in (layer(torch.bfloat16), layer(torch.float32, hidden=25), replace(good, down=good.gate_up)):
        with pytest.raises(ValueError, match="not those of one decoder's layers"):
            LayerStack([good, wrong], both, 1e-5)
    for head in (ends(torch.bfloat16).head, ends(torch.float32, hidden=25).head):
        with pytest.raises(ValueError, match="not those of one decoder's layers"):
            LayerStack([good], replace(both, head=head), 1e-5)
    for table in (both.embedding.bfloat16(), both.embedding[:, :-1], both.embedding[:, ::2]):
        with pytest.raises(ValueError, match=r"an embedding of torch\.\w+ \(9, \d+\) for torch\.float32 24"):
            LayerStack([good], replace(both, embedding=table), 1e-5)
    stack, pool = LayerStack([good, good], both, 1e-5), torch.zeros(2, 4, 2, G, D)
    tokens, first = torch.zeros(1, dtype=torch.int64), slice(0, 1)
    assert stack(tokens, first, attention(), pool).shape == (1, VOCAB)
    for wrong_tokens in (tokens.int(), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"torch\.int\d\d \(\d,\) for 1 rows"):
            stack(wrong_tokens, first, attention(), pool)
    for unknown in (-1, VOCAB):
        with pytest.raises(IndexError, match="a token that has no embedding"):
            stack(tokens + unknown, first, attention(), pool)
    with pytest.raises(ValueError, match=r"a pool of 1 torch\.float32 layers for 2 of torch\.float32"):
        stack(tokens, first, attention(), pool[:1])
    with pytest.raises(ValueError, match=r"a pool of 2 torch\.bfloat16 layers for 2"):
        stack(tokens, first, attention(), pool.bfloat16())
    with pytest.raises(ValueError, match="heads that are not those of the layers"):
        stack(tokens, first, attention(heads=5), pool)
    with pytest.raises(TypeError, match="21 arguments expected"):
        stack._native(1)
    with pytest.raises(ValueError, match="PyCapsule"):
        LINEARS.Stack(object(), 1, 1e-5, (), (0, 0, 0, both.head.native))
    with pytest.raises(ValueError, match="not those of one decoder's layers"):
        LINEARS.Stack(LAYERS.calls, 1, 1e-5, (), (0, 0, 0, both.head.native))


def test_logits_are_those_of_the_wanted_rows() -> None:
    stack, pool = LayerStack([layer(torch.float32)], ends(torch.float32), 1e-5), torch.zeros(1, 4, 2, G, D)
    token = torch.full((1,), 3)
    logits = stack(token, slice(0, 1), attention(), pool)
    assert torch.equal(stack(token, torch.zeros(1, dtype=torch.int64), attention(), pool), logits)
    assert stack(token, slice(1, 1), attention(), pool).shape == (0, VOCAB)
    assert not torch.equal(stack(token + 1, slice(0, 1), attention(), pool), logits)


def test_the_given_weights_are_kept() -> None:
    weights = layer(torch.float32, kind=Int8Linear)
    stack, pool = LayerStack([weights], ends(torch.float32), 1e-5), torch.zeros(1, 4, 2, G, D)
    del weights
    token, first = torch.ones(1, dtype=torch.int64), slice(0, 1)
    logits = stack(token, first, attention(), pool)
    layer(torch.float32, kind=Int8Linear)  # in memory that has become free, if any has
    ends(torch.float32)
    assert torch.equal(stack(token, first, attention(), pool), logits)
