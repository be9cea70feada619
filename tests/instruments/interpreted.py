"""Triton's interpreter as a stand-in for a device: what its bfloat16 lacks."""

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder


def repair(patch: pytest.MonkeyPatch) -> None:
    """Lets bfloat16 be multiplied as numbers and rounded to nearest, as devices do.

    The interpreter keeps it in uint16: it multiplies those, and cuts off where it should round.
    """
    dot, cast = Builder.create_dot, Builder.cast_impl

    def dot_of_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, *(_widened(self, x) for x in (a, b)), *rest)

    def rounded_cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(rounded, tl.bfloat16)
        return cast(self, source, target)

    def _widened(self: Any, x: Any) -> Any:
        return cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    patch.setattr(Builder, "create_dot", dot_of_numbers)
    patch.setattr(Builder, "cast_impl", rounded_cast)
