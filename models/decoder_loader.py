"""From a folder to a network that is ready to run, without what its texts need."""

from pathlib import Path

import torch

from outrider.models.config import ModelConfig, load_config
from outrider.models.decoder import Decoder
from outrider.models.device import CPU
from outrider.models.kernel_set import kernels_for
from outrider.models.numerics import Numerics
from outrider.models.parallel import TensorParallel
from outrider.models.weights import Checkpoint
from outrider.speculation.errors import InvalidConfigError

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def load_decoder(
    folder: Path,
    *,
    dtype: str,
    numerics: Numerics,
    max_model_len: int | None,
    ranks: TensorParallel,
    device: torch.device = CPU,
    quantization: str | None = None,
) -> Decoder:
    """The network in ``folder``, or this rank's part of it; arguments and errors as for ``load_model``."""
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
        dtype=_dtype(dtype, config, device),
        numerics=numerics,
        max_model_len=max_model_len or limit,
        ranks=ranks,
        device=device,
        kernels=kernels_for(device),
        quantization=quantization,
    )


def _dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    wanted = config.dtype if name == "auto" else name
    if wanted == "float16" and name == "auto":
        # No CPU kernels worth having; float32 holds every float16 value.
        return torch.float32 if device.type == "cpu" else torch.float16
    if wanted not in DTYPES:
        raise InvalidConfigError(f"dtype must be auto, {', '.join(DTYPES)}, not {name!r}")
    if wanted == "float64" and device.type != "cpu":
        raise InvalidConfigError(f"dtype float64 is for device cpu, not {device.type}")
    return DTYPES[wanted]
