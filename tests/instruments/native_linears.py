"""What native linear layers of every kind are tested on: instruction sets, dtypes, shapes."""

from typing import Any

import pytest
import torch

from outrider.kernels.native import library

NATIVE = library.load()
LAYERS = library.layers(torch.empty(0))
"""What computes between them, or None."""
PATHS = NATIVE.paths() if NATIVE else []
DTYPES = [torch.bfloat16, torch.float32]
SHAPES = [(640, 384), (384, 1024), (64, 32), (33, 7), (1, 129), (17, 31), (100, 95), (31, 1)]
"""Outputs and inputs; many are no multiple of a vector's, a tile's or a group's size."""

needs_native = pytest.mark.skipif(NATIVE is None, reason="the native module is not built or is switched off")


def on_every_path(test: Any) -> Any:
    """Runs a test once for each instruction set that this processor has."""
    chosen = pytest.mark.parametrize("linear_path", PATHS, indirect=True)(test)
    return needs_native(pytest.mark.usefixtures("linear_path")(chosen))
