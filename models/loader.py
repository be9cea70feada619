"""From a folder or hub id to a network that is ready to run."""

from dataclasses import dataclass
from pathlib import Path

import torch

from outrider.models.config import ModelConfig, load_config
from outrider.models.decoder import Decoder
from outrider.models.decoder_loader import load_decoder
from outrider.models.device import CPU
from outrider.models.numerics import Numerics
from outrider.models.parallel import ALONE, TensorParallel
from outrider.models.resolve import resolve_model
from outrider.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A network with its tokenizer."""

    folder: Path
    config: ModelConfig
    decoder: Decoder
    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        """Tokens that can be chosen: the tokenizer's, unless the head has fewer."""
        return min(self.config.vocab_size, self.tokenizer.vocab_size)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every token that ends a text; a configuration may name some that cannot be chosen."""
        own = self.tokenizer.eos_token_id
        named = (*self.config.eos_token_ids, *(() if own is None else (own,)))
        return tuple(each for each in dict.fromkeys(named) if each < self.vocab_size)


def load_model(
    name_or_path: str,
    *,
    dtype: str,
    numerics: Numerics,
    max_model_len: int | None,
    ranks: TensorParallel = ALONE,
    device: torch.device = CPU,
    quantization: str | None = None,
) -> LoadedModel:
    """Loads an unmodified Hugging Face folder or hub id.

    dtype: ``float32``, ``bfloat16``, ``float64`` or ``auto``, the one the weights are saved in (float16:
        float32 on CPU).
    max_model_len: tokens of the longest sequence; None takes the model's own limit.
    ranks: those that load the other parts of it at the same time.
    device: see ``choose_device``.
    quantization: ``int8`` quantises the weights of linear layers, for drafters; None leaves them.

    Raises:
        ModelError: see the errors of ``resolve_model``, ``load_config`` and ``Checkpoint``.
        InvalidConfigError: ``dtype``, ``max_model_len`` or ``quantization`` is not possible for this model.
    """
    folder = resolve_model(name_or_path)
    decoder = load_decoder(
        folder,
        dtype=dtype,
        numerics=numerics,
        max_model_len=max_model_len,
        ranks=ranks,
        device=device,
        quantization=quantization,
    )
    config = decoder.shard.whole
    return LoadedModel(folder=folder, config=config, decoder=decoder, tokenizer=Tokenizer.load(folder))


def context_length(name_or_path: str) -> int:
    """Tokens of the longest sequence that a model was made for; errors as for ``load_model``."""
    return load_config(resolve_model(name_or_path)).max_position_embeddings
