"""Reading config.json: both spellings of transformers, and refusals that name the value."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from outrider.models.config import ModelConfig, load_config
from outrider.models.rope import RopeConfig
from outrider.speculation.errors import CheckpointError, ModelError, ModelNotFoundError, UnsupportedModelError

# As meta-llama/Llama-3.2-1B and Qwen/Qwen2.5-0.5B-Instruct have them, written by transformers 4.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def load(folder: Path, raw: dict[str, Any], **changes: Any) -> ModelConfig:
    """Configuration of ``raw`` with ``changes``, where ``...`` removes a key."""
    merged = {key: value for key, value in {**raw, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(merged))
    return load_config(folder)


def test_transformers_4_llama(tmp_path: Path) -> None:
    assert load(tmp_path, LLAMA) == ModelConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        rope=RopeConfig(
            theta=500000.0,
            rope_type="llama3",
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        sliding_window=None,
        eos_token_ids=(128001,),
        bos_token_id=128000,
        dtype="bfloat16",
    )


@pytest.mark.parametrize(
    ("changes", "window"),
    [({}, 4096), ({"sliding_window": 8192}, 8192), ({"sliding_window": None}, None)],
)
def test_mistral_has_a_window(tmp_path: Path, changes: dict[str, Any], window: int | None) -> None:
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], **changes}
    config = load(tmp_path, LLAMA, **mistral)
    assert config.sliding_window == window
    assert not config.qkv_bias


def test_transformers_5_spelling_means_the_same(tmp_path: Path) -> None:
    new = load(
        tmp_path,
        LLAMA,
        rope_parameters={**LLAMA["rope_scaling"], "rope_theta": 500000.0},
        dtype="bfloat16",
        rope_scaling=...,
        rope_theta=...,
        torch_dtype=...,
    )
    assert new == load(tmp_path, LLAMA)


def test_qwen2_has_biases_where_its_code_has_them(tmp_path: Path) -> None:
    config = load(tmp_path, QWEN2)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, False, False)
    assert (config.head_dim, config.num_kv_heads, config.qk_norm) == (64, 2, False)
    assert config.rope == RopeConfig(theta=1e6, original_max_position_embeddings=32768)


def test_llama_biases_come_from_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, LLAMA, attention_bias=True, mlp_bias=True)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, True, True)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_fields_fit_the_tensors_that_transformers_saves(
    make_model_folder: Any, family: str, tied: bool, biased: bool
) -> None:
    folder = make_model_folder(family, tie_word_embeddings=tied, attention_bias=biased)
    config = load_config(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    attention = "model.layers.1.self_attn."

    assert shapes["model.embed_tokens.weight"] == (config.vocab_size, config.hidden_size)
    assert shapes[attention + "q_proj.weight"] == (config.num_heads * config.head_dim, config.hidden_size)
    assert shapes[attention + "k_proj.weight"] == (config.num_kv_heads * config.head_dim, config.hidden_size)
    assert shapes["model.layers.1.mlp.up_proj.weight"] == (config.intermediate_size, config.hidden_size)
    assert f"model.layers.{config.num_layers - 1}.input_layernorm.weight" in shapes
    assert f"model.layers.{config.num_layers}.input_layernorm.weight" not in shapes
    assert (attention + "q_proj.bias" in shapes) == config.qkv_bias
    assert (attention + "o_proj.bias" in shapes) == config.output_bias
    assert (attention + "q_norm.weight" in shapes) == config.qk_norm
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == config.tie_word_embeddings
    assert getattr(torch, config.dtype) == model.dtype


def test_head_dim_may_be_left_out(tmp_path: Path) -> None:
    assert load(tmp_path, LLAMA, head_dim=...).head_dim == 64
    assert load(tmp_path, LLAMA, head_dim=None, num_attention_heads=16).head_dim == 128
    qwen3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": ...}
    assert load(tmp_path, LLAMA, **qwen3).head_dim == 128


def test_yarn_of_qwen(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    assert load(tmp_path, QWEN2, rope_scaling=scaling).rope == RopeConfig(
        theta=1e6, rope_type="yarn", factor=4.0, original_max_position_embeddings=8192
    )
    del scaling["factor"]
    assert load(tmp_path, QWEN2, rope_scaling=scaling).rope.factor == 32768 / 8192
    beside = load(tmp_path, QWEN2, rope_scaling=scaling, original_max_position_embeddings=4096).rope
    assert beside.original_max_position_embeddings == 4096, "the top level wins, as in transformers"


def test_rope_defaults_of_the_first_llama(tmp_path: Path) -> None:
    rope = load(tmp_path, LLAMA, rope_scaling=None, rope_theta=...).rope
    assert (rope.rope_type, rope.theta) == ("default", 10_000.0)


def test_end_of_text_ids(tmp_path: Path) -> None:
    assert load(tmp_path, LLAMA, eos_token_id=[5, 7]).eos_token_ids == (5, 7)
    assert load(tmp_path, LLAMA, eos_token_id=None).eos_token_ids == ()
    assert load(tmp_path, LLAMA, eos_token_id=...).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert load(tmp_path, LLAMA).eos_token_ids == (8, 9)
    (tmp_path / "generation_config.json").write_text("{}")
    assert load(tmp_path, LLAMA).eos_token_ids == (128001,)


def test_beginning_of_text_id(tmp_path: Path) -> None:
    assert load(tmp_path, LLAMA, bos_token_id=None).bos_token_id is None
    assert load(tmp_path, LLAMA, bos_token_id=0).bos_token_id == 0


def test_missing_folder_and_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no model folder .*absent"):
        load_config(tmp_path / "absent")
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        load_config(tmp_path)


@pytest.mark.parametrize("content", ['{"model_type": "lla', "", "\udcff"])
def test_half_written_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        load_config(tmp_path)


def test_file_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"must be a JSON object, not \[1\]"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported"),
        ({"model_type": ...}, "model_type None is not supported"),
        ({"architectures": ["LlamaForTokenClassification"]}, "'LlamaForTokenClassification'"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantisation 'gptq' is not supported",
        ),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.My"}}, "remote code.*modeling.My"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window .*4096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention' is not supported"),
        ({"head_dim": 63}, "head_dim 63 is odd"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_scaling": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}, "rope type 'longrope'"),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "per layer type .'full_attention'"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
    ],
)
def test_unsupported_models_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as raised:
        load(tmp_path, LLAMA, **changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive number, not 0"),
        ({"intermediate_size": -3}, "intermediate_size must be a positive number, not -3"),
        ({"hidden_size": "2048"}, "hidden_size must be a positive number, not '2048'"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive number, not True"),
        ({"vocab_size": 3.5}, "vocab_size must be a whole number, not 3.5"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, not 0"),
        ({"num_key_value_heads": 5}, "num_attention_heads 32 is not a multiple of num_key_value_heads 5"),
        ({"head_dim": None, "hidden_size": 2050}, "hidden_size 2050 is not a multiple"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, not 'yes'"),
        ({"eos_token_id": ["</s>"]}, r"eos_token_id must be token ids, not \['</s>'\]"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number, not -1.0"),
        ({"rope_scaling": "linear"}, "rope_scaling must be a JSON object, not 'linear'"),
    ],
)
def test_impossible_values_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, LLAMA, **changes)


def test_all_refusals_are_model_errors() -> None:
    assert issubclass(CheckpointError, ModelError)
    assert issubclass(UnsupportedModelError, ModelError)
