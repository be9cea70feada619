"""What a model is, read from the ``config.json`` of its Hugging Face folder.

The file is read here and not through transformers' ``AutoConfig``, so that whatever
Outrider does not compute is refused by name instead of being ignored. Files of
transformers 4 (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and 5
(``rope_parameters``, ``dtype``) mean the same.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider.models.rope import RopeConfig
from outrider.speculation.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
DTYPES = ("float16", "bfloat16", "float32", "float64")

# What transformers takes for a key that config.json leaves out. A null is not such a key.
DEFAULT_HEAD_DIM = {"qwen3": 128}
DEFAULT_BOS = {"llama": 1, "mistral": 1}
DEFAULT_EOS = {"llama": 2, "mistral": 2}
DEFAULT_WINDOW = {"mistral": 4096}
DEFAULT_THETA = 10_000.0

ROPE_REQUIRED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
ROPE_NUMBERS = (
    "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
    "attention_factor", "mscale", "mscale_all_dim",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and conventions of one decoder; sizes are counts of elements, heads or tokens."""

    model_type: str
    vocab_size: int
    """Rows of the embedding and of the head; may exceed the tokenizer's tokens (padding)."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """Whether queries and keys are normalised per head before they are rotated (qwen3)."""
    rope: RopeConfig
    sliding_window: int | None
    """A token attends the last so many, itself included; None: all before it."""
    eos_token_ids: tuple[int, ...]
    """Every token that ends a text; empty where the model names none."""
    bos_token_id: int | None
    dtype: str
    """Type of the saved weights, one of ``DTYPES``."""


def load_config(folder: Path) -> ModelConfig:
    """Configuration of the model in ``folder``.

    Raises:
        ModelNotFoundError: there is no such folder, or it has no ``config.json``.
        CheckpointError: the file is not JSON, or a value is missing or impossible.
        UnsupportedModelError: the model needs something that Outrider does not compute.
    """
    if not folder.is_dir():
        raise ModelNotFoundError(f"there is no model folder {folder}")
    fields = _Fields.read(folder / "config.json")
    model_type = _supported_model_type(fields)
    _refuse_unsupported(fields)
    heads = fields.integer("num_attention_heads")
    attention_bias = fields.flag("attention_bias") and model_type != "mistral"
    return ModelConfig(
        model_type=model_type,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_num_kv_heads(fields, heads),
        head_dim=_head_dim(fields, model_type, heads),
        rms_norm_eps=fields.number("rms_norm_eps"),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=attention_bias or model_type == "qwen2",
        output_bias=attention_bias and model_type != "qwen2",
        mlp_bias=fields.flag("mlp_bias") and model_type == "llama",
        qk_norm=model_type == "qwen3",
        rope=_rope(fields),
        sliding_window=_sliding_window(fields, model_type),
        eos_token_ids=_eos_token_ids(fields, DEFAULT_EOS.get(model_type), folder),
        bos_token_id=fields.token("bos_token_id", DEFAULT_BOS.get(model_type)),
        dtype=_dtype(fields),
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    """A JSON object whose values are checked as they are read; its errors name file, key and value."""

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "_Fields":
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelNotFoundError(f"{path.parent} is no model folder: it has no {path.name}") from None
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from None
        return cls(path, values).checked("its content", values)

    def checked(self, what: str, values: object) -> "_Fields":
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.path}: {what} must be a JSON object, not {values!r}")
        return _Fields(self.path, values)

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def section(self, key: str) -> "_Fields":
        """The object under ``key``; empty where it is missing or null."""
        return self.checked(key, {} if self.get(key) is None else self.get(key))

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = default if self.get(key) is None else self.get(key)
        if value is None:
            raise CheckpointError(f"{self.path}: {key} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise CheckpointError(f"{self.path}: {key} must be a positive number, not {value!r}")
        return float(value)

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.number(key, default)
        if not value.is_integer():
            raise CheckpointError(f"{self.path}: {key} must be a whole number, not {value!r}")
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {key} must be true or false, not {value!r}")
        return value

    def tokens(self, key: str, default: int | None = None) -> tuple[int, ...]:
        """Token ids given as one id, a list of them, or null."""
        value = self.values.get(key, default)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(id_) is int and id_ >= 0 for id_ in ids):
            raise CheckpointError(f"{self.path}: {key} must be token ids, not {value!r}")
        return tuple(ids)

    def token(self, key: str, default: int | None = None) -> int | None:
        return next(iter(self.tokens(key, default)), None)

    def unsupported(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.path}: {reason}")


def _supported_model_type(fields: _Fields) -> str:
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise fields.unsupported(f"model_type {model_type!r} is not supported, only {known}")
    architectures = fields.get("architectures")
    if architectures and ARCHITECTURES[model_type] not in architectures:
        raise fields.unsupported(
            f"architectures {architectures!r} are not supported, only {ARCHITECTURES[model_type]}"
        )
    return model_type


def _refuse_unsupported(fields: _Fields) -> None:
    quantization = fields.section("quantization_config").values
    if quantization:
        method = quantization.get("quant_method", "unnamed")
        raise fields.unsupported(f"quantisation {method!r} is not supported")
    if fields.get("auto_map"):
        raise fields.unsupported(
            f"auto_map asks for remote code, which is never run: {fields.get('auto_map')}"
        )
    if fields.get("hidden_act") not in (None, "silu"):
        raise fields.unsupported(f"hidden_act {fields.get('hidden_act')!r} is not supported, only 'silu'")
    if fields.flag("use_sliding_window"):
        window = fields.get("sliding_window")
        raise fields.unsupported(f"use_sliding_window (sliding_window={window}) is not supported")
    for layer_type in fields.get("layer_types") or ():
        if layer_type != "full_attention":
            raise fields.unsupported(f"layer type {layer_type!r} is not supported, only 'full_attention'")


def _sliding_window(fields: _Fields, model_type: str) -> int | None:
    if model_type != "mistral":
        return None
    if "sliding_window" in fields.values and fields.get("sliding_window") is None:
        return None
    return fields.integer("sliding_window", DEFAULT_WINDOW[model_type])


def _num_kv_heads(fields: _Fields, heads: int) -> int:
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"{fields.path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    return kv_heads


def _head_dim(fields: _Fields, model_type: str, heads: int) -> int:
    hidden = fields.integer("hidden_size")
    head_dim = fields.integer("head_dim", DEFAULT_HEAD_DIM.get(model_type, max(hidden // heads, 1)))
    if fields.get("head_dim") is None and model_type not in DEFAULT_HEAD_DIM and hidden % heads:
        raise CheckpointError(
            f"{fields.path}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
        )
    if head_dim % 2:
        raise fields.unsupported(f"head_dim {head_dim} is odd, and rotary embeddings turn pairs")
    return head_dim


def _rope(fields: _Fields) -> RopeConfig:
    # rope_scaling comes first in transformers 5 too, where a file has both.
    scaling = fields.section("rope_scaling" if fields.get("rope_scaling") else "rope_parameters")
    _refuse_unsupported_rope(fields, scaling)
    rope_type = str(scaling.get("rope_type") or scaling.get("type") or "default")
    context = fields.integer("max_position_embeddings")
    original = scaling.integer("original_max_position_embeddings", context)
    original = fields.integer("original_max_position_embeddings", original)
    required = ROPE_REQUIRED.get(rope_type, ())
    numbers = {
        key: scaling.number(key) for key in ROPE_NUMBERS if key in required or scaling.get(key) is not None
    }
    numbers.setdefault("factor", context / original)
    return RopeConfig(
        theta=scaling.number("rope_theta", fields.number("rope_theta", DEFAULT_THETA)),
        rope_type=rope_type,
        original_max_position_embeddings=original,
        truncate=scaling.flag("truncate", True),
        **numbers,
    )


def _refuse_unsupported_rope(fields: _Fields, scaling: _Fields) -> None:
    for key, value in scaling.values.items():
        if isinstance(value, dict):
            raise fields.unsupported(f"rope parameters per layer type ({key!r}) are not supported")
    partial = scaling.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise fields.unsupported(f"partial_rotary_factor {partial} is not supported, only 1.0")


def _eos_token_ids(fields: _Fields, default: int | None, folder: Path) -> tuple[int, ...]:
    """generation_config.json wins, as it does in transformers' ``generate``."""
    path = folder / "generation_config.json"
    generation = _Fields.read(path).tokens("eos_token_id") if path.exists() else ()
    return generation or fields.tokens("eos_token_id", default)


def _dtype(fields: _Fields) -> str:
    dtype = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise fields.unsupported(f"dtype {dtype!r} is not supported, only {', '.join(DTYPES)}")
    return str(dtype)
