"""The native linear layers on every instruction set of this processor: error, bits, odd shapes, fallback."""

import logging
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from instruments.native_linears import DTYPES, PATHS, SHAPES, needs_native, on_every_path

from outrider.kernels.linear import Linear, linear_reference
from outrider.kernels.native import library

ROWS = (*range(1, 36), 47, 48, 49, 63, 64)


def layer(
    shape: tuple[int, int], dtype: torch.dtype, *, bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Weight, bias and 64 rows of input."""
    generator = torch.Generator().manual_seed(shape[0] * 10_000 + shape[1])
    weight = torch.randn(shape, generator=generator).to(dtype)
    offset = torch.randn(shape[0], generator=generator).to(dtype) if bias else None
    return weight, offset, torch.randn(64, shape[1], generator=generator).to(dtype)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


@on_every_path
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_error_is_not_above_pytorchs(dtype: torch.dtype, bias: bool) -> None:
    # Over many outputs, so that chance does not decide; both round once more at the end.
    for shape in ((640, 384), (384, 1024), (4096, 192)):
        weight, offset, x = layer(shape, dtype, bias=bias)
        linear = Linear(weight, offset)
        for rows in (1, 4, 16, 64):
            want = exact(x[:rows], weight, offset)
            ours = (linear(x[:rows]).double() - want).abs()
            plain = (F.linear(x[:rows], weight, offset).double() - want).abs()
            assert ours.mean() <= 1.02 * plain.mean(), (shape, rows)
            assert ours.max() <= 1.02 * plain.max() + want.abs().max() * torch.finfo(dtype).eps / 4, (
                shape,
                rows,
            )


@on_every_path
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("threads")
def test_a_rows_bits_do_not_depend_on_its_company(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, offset, x = layer(shape, dtype, bias=True)
    linear = Linear(weight, offset)
    torch.set_num_threads(1)
    alone = torch.cat([linear(row[None]) for row in x])
    torch.testing.assert_close(
        alone, linear_reference(x, weight, offset), atol=2e-4, rtol=2 * torch.finfo(dtype).eps
    )
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in ROWS:
            for first in sorted({0, 1, (64 - rows) // 2, 64 - rows}):
                taken = x[first : first + rows]
                assert torch.equal(linear(taken), alone[first : first + rows]), (threads, rows, first)
        many = torch.cat((x, x[:50], x))
        assert torch.equal(linear(many), torch.cat((alone, alone[:50], alone)))


@on_every_path
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 40), (64, 64), (5, 3)])
def test_infinities_and_nans_go_where_they_belong(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, offset, x = layer(shape, dtype, bias=True)
    x[3, -1] = torch.inf
    x[4, 0] = torch.nan
    x[5, 0], x[5, 1] = torch.inf, -torch.inf
    x[6] = torch.finfo(dtype).max
    weight[1, 2] = torch.inf
    weight[2, 1] = 0
    for rows in (7, 20, 64):
        want = linear_reference(x[:rows], weight, offset)
        got = Linear(weight, offset)(x[:rows])
        overflowed = torch.arange(rows) == 6  # when it overflows on the way depends on the order
        assert torch.equal(got.isnan()[~overflowed], want.isnan()[~overflowed])
        assert torch.equal(got.isinf()[~overflowed], want.isinf()[~overflowed])
        same = want.isinf() & ~overflowed[:, None]
        assert torch.equal(got[same], want[same])
        assert not got[7:, 3:].isnan().any()


@on_every_path
def test_results_are_rounded_to_nearest_even() -> None:
    # 1 + 2^-8 lies midway between two bfloat16 numbers, 1 + 3 * 2^-8 too: one goes down, one up.
    weight = torch.tensor([[1.0, 2**-8], [1.0, 3 * 2**-8], [-1.0, -(2**-8)]], dtype=torch.bfloat16)
    got = Linear(weight)(torch.ones(1, 2, dtype=torch.bfloat16))
    assert got.tolist() == [[1.0, 1 + 2**-6, -1.0]]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_strange_inputs_are_taken_or_refused(dtype: torch.dtype) -> None:
    weight, offset, x = layer((64, 32), dtype, bias=True)
    linear = Linear(weight, offset)
    wide = torch.cat((x, x), dim=1)
    assert torch.equal(linear(wide[:, :32]), linear(x))
    assert torch.equal(Linear(weight.T.contiguous().T, offset)(x), linear(x))
    assert linear(x[:0]).shape == (0, 64)
    for wrong in (x[:, :31], x.double(), x[None], x.to("meta")):
        with pytest.raises(ValueError, match="for torch"):
            linear(wrong)


@needs_native
def test_the_given_weights_are_not_kept() -> None:
    weight, _, _ = layer((64, 32), torch.bfloat16, bias=False)
    storage = weight.untyped_storage()._weak_ref()
    linear = Linear(weight)
    del weight
    assert torch.UntypedStorage._expired(storage)
    assert linear.packed
    torch.UntypedStorage._free_weak_ref(storage)


@pytest.mark.skipif("amx" not in PATHS, reason="no AMX")
def test_a_layers_weights_are_compact_where_that_saves_bytes() -> None:
    weight, _, x = layer((640, 384), torch.bfloat16, bias=False)
    bell_curve = Linear(weight)
    assert bell_curve.nbytes < 0.72 * weight.nbytes
    bits = torch.randint(-(1 << 15), 1 << 15, weight.shape, dtype=torch.int16)
    any_bits = Linear(bits.view(torch.bfloat16).nan_to_num())
    assert any_bits.nbytes == weight.nbytes
    bits[32:] = weight[32:].view(torch.int16)
    mixed = Linear(bits.view(torch.bfloat16).nan_to_num())
    assert mixed.nbytes < 0.75 * weight.nbytes
    for rows in (1, 17, 64):
        same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
        same(mixed(x[:rows])[:, 32:], bell_curve(x[:rows])[:, 32:])
        same(mixed(x[:rows])[:, :32], any_bits(x[:rows])[:, :32])


@needs_native
def test_one_openmp_runtime_is_loaded() -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc/self/maps to look at")
    Linear(torch.ones(64, 32))(torch.ones(1, 32))
    names = {Path(line.split()[-1]).name for line in maps.read_text().splitlines() if "/" in line}
    runtimes = {name for name in names if re.match(r"lib(g|i)?omp[-.\d]", name)}
    assert len(runtimes) <= 1


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


MAKE_TWO_LAYERS = """
import os, sys
{before}
import torch
from outrider.kernels.linear import Linear, linear_reference
weight, x = torch.randn(64, 32), torch.randn(3, 32)
for dtype in (torch.bfloat16, torch.float32, torch.float64):
    torch.testing.assert_close(
        Linear(weight.to(dtype))(x.to(dtype)), linear_reference(x.to(dtype), weight.to(dtype))
    )
print(os.environ.get("ONEDNN_MAX_CPU_ISA"), Linear(weight).native is None)
"""


@pytest.mark.parametrize(
    ("before", "variables", "why"),
    [
        ("sys.modules['outrider.kernels.native._linear'] = None", {library.VARIABLE: ""}, "not built"),
        ("", {library.VARIABLE: "off"}, "switched off by OUTRIDER_CPU_KERNEL"),
    ],
)
def test_without_the_module_pytorch_computes_and_one_line_says_so(
    before: str, variables: dict[str, str], why: str
) -> None:
    variables["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
    done = run_python(MAKE_TWO_LAYERS.format(before=before), **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["AVX512_CORE_BF16", "True"]
    lines = [line for line in done.stderr.splitlines() if "native linear layers" in line]
    assert lines == [f"native linear layers are {why}: PyTorch's own are used, which are slower"]


@needs_native
@pytest.mark.parametrize("path", PATHS)
def test_the_environment_chooses_the_path(path: str) -> None:
    code = "from outrider.kernels.native import library; print(library.load().selected())"
    done = run_python(code, **{library.VARIABLE: path})
    assert done.stdout.split() == [path]


@needs_native
def test_an_unknown_path_is_refused() -> None:
    done = run_python("import outrider.kernels.linear", **{library.VARIABLE: "abacus"})
    assert done.returncode != 0
    assert "OUTRIDER_CPU_KERNEL=abacus: not off and none of " in done.stderr


@needs_native
def test_an_unknown_path_is_wrong_usage() -> None:
    command = "import sys; from outrider.cluster.cli.main import main; sys.exit(main({!r}))"
    done = run_python(command.format(["generate", "--prompt", "a"]), **{library.VARIABLE: "abacus"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("outrider: error: OUTRIDER_CPU_KERNEL=abacus: not off and none of ")
    assert done.stderr.count("\n") == 1


def test_float64_is_pytorchs_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    weight, offset, x = layer((33, 7), torch.float64, bias=True)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(Linear(weight, offset)(x), F.linear(x, weight, offset))
    assert not caplog.records
