"""How the weights of linear layers stand in memory: as they were saved, or, in drafters, with eight bits."""

from collections.abc import Callable
from pathlib import Path

import torch

from outrider.kernels.int8_linear import Int8Linear
from outrider.kernels.linear import Linear
from outrider.speculation.errors import CheckpointError, InvalidConfigError

QUANTIZATIONS = {"int8": Int8Linear}

MakeLinear = Callable[[torch.Tensor, torch.Tensor | None], Linear]
"""``(weight, bias)``; see ``Linear``."""


def linear_maker(quantization: str | None, folder: Path, device: torch.device) -> MakeLinear:
    """What makes the layers of the checkpoint in ``folder``.

    Raises:
        InvalidConfigError: there is no such quantisation, or not on this device. What is returned raises
            CheckpointError where weights cannot be quantised.
    """
    if quantization is None:
        return Linear
    if quantization not in QUANTIZATIONS:
        raise InvalidConfigError(f"quantization must be {' or '.join(QUANTIZATIONS)}, not {quantization!r}")
    if device.type != "cpu":
        raise InvalidConfigError(f"quantization {quantization!r} is for CPUs, not for device {device.type!r}")
    kind = QUANTIZATIONS[quantization]

    def make(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        try:
            return kind(weight, bias)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from None

    return make
