"""From a folder or hub id to a network that is ready to run."""

from dataclasses import dataclass
from pathlib import Path

import torch

from outrider.models.config import ModelConfig, load_config
from outrider.models.decoder import Decoder
from outrider.models.numerics import Numerics
from outrider.models.parallel import ALONE, TensorParallel
from outrider.models.resolve import resolve_model
from outrider.models.tokenizer import Tokenizer
from outrider.models.weights import Checkpoint
from outrider.speculation.errors import InvalidConfigError

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


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
) -> LoadedModel:
    """Loads an unmodified Hugging Face folder or hub id.

    dtype: one of ``DTYPES`` or ``auto``, the one the weights are saved in.
    max_model_len: tokens of the longest sequence; None takes the model's own limit.
    ranks: those that load the other parts of it at the same time.

    Raises:
        ModelError: see the errors of ``resolve_model``, ``load_config`` and ``Checkpoint``.
        InvalidConfigError: ``dtype`` or ``max_model_len`` is not possible for this model.
    """
    folder = resolve_model(name_or_path)
    decoder = load_decoder(folder, dtype=dtype, numerics=numerics, max_model_len=max_model_len, ranks=ranks)
    config = decoder.shard.whole
    return LoadedModel(folder=folder, config=config, decoder=decoder, tokenizer=Tokenizer.load(folder))


def load_decoder(
    folder: Path, *, dtype: str, numerics: Numerics, max_model_len: int | None, ranks: TensorParallel
) -> Decoder:
    """The network in ``folder``, or this rank's part of it; see ``load_model``."""
    config = load_config(folder)
    limit = config.max_position_embeddings
    whole = isinstance(max_model_len, int) and not isinstance(max_model_len, bool)
    if max_model_len is not None and not (whole and 1 < max_model_len <= limit):
        raise InvalidConfigError(
            f"max_model_len must be from 2 to {folder.name}'s {limit}, not {max_model_len!r}"
        )
    return Decoder(
        config,
        Checkpoint(folder),
        dtype=_dtype(dtype, config),
        numerics=numerics,
        max_model_len=max_model_len or limit,
        ranks=ranks,
    )


def context_length(name_or_path: str) -> int:
    """Tokens of the longest sequence that a model was made for; errors as for ``load_model``."""
    return load_config(resolve_model(name_or_path)).max_position_embeddings


def _dtype(name: str, config: ModelConfig) -> torch.dtype:
    wanted = config.dtype if name == "auto" else name
    if wanted == "float16" and name == "auto":
        # No CPU kernels worth having; float32 holds every float16 value.
        return torch.float32
    if wanted not in DTYPES:
        raise InvalidConfigError(f"dtype must be auto, {', '.join(DTYPES)}, not {name!r}")
    return DTYPES[wanted]
