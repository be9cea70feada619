"""The native kernels in programs of their own, by every instruction set that is here, under sanitizers."""

from pathlib import Path

import pytest
from instruments.sanitized import run_sanitized


@pytest.mark.parametrize("source", ["native_linear.cpp", "native_layers.cpp", "native_grafting.cpp"])
def test_sanitizers_find_nothing(source: str, tmp_path: Path) -> None:
    assert "no error" in run_sanitized(source, tmp_path)
