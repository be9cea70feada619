"""Logits against transformers, so that plain decoding does not vouch for itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forwards import bushy_tree, chunked_logits, make_runner, random_ids, verify
from transformers import AutoModelForCausalLM

from outrider.models.numerics import Numerics

TOLERANCE = 1e-4
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "yarn-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 33}),
    "mistral-window-in-the-tree": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}


def reference_logits(folder: Path, ids: np.ndarray) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(ids)[None]).logits[0]


@pytest.mark.parametrize("numerics", list(Numerics))
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str, numerics: Numerics, make_model_folder: Any) -> None:
    family, config = MODELS[name]
    folder = make_model_folder(family, **config)
    ids = random_ids(150)
    expected = reference_logits(folder, ids)
    runner = make_runner(folder, numerics=numerics, num_sequences=3)

    prefill, _ = chunked_logits(runner, ids, [64, 64, 22])
    assert (prefill - expected).abs().max() <= TOLERANCE
    incremental, _ = chunked_logits(runner, ids, [60, 40, *[1] * 50])
    assert (incremental - expected).abs().max() <= TOLERANCE

    root = 120
    _, sequence = chunked_logits(runner, ids[:root], [60, 60])
    tree, path = bushy_tree(ids[root + 1 : root + 13], junk=3)
    logits = verify(runner, sequence, int(ids[root]), tree)
    on_path = logits[[0, *(node + 1 for node in path)]]
    assert (on_path - expected[root : root + 13]).abs().max() <= TOLERANCE


def test_the_tolerance_notices_a_wrong_position(make_model_folder: Any) -> None:
    folder = make_model_folder("llama")
    ids = random_ids(40)
    expected = reference_logits(folder, ids)
    runner = make_runner(folder)
    _, sequence = chunked_logits(runner, ids[:20], [20])
    sequence.length -= 1
    tree, _ = bushy_tree(ids[21:22], junk=0)
    assert (verify(runner, sequence, int(ids[20]), tree)[0] - expected[20]).abs().max() > TOLERANCE
