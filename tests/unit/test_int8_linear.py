"""Linear layers with weights of eight bits: quantisation, error, bits, odd shapes, fallback."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from instruments.native_linears import DTYPES, SHAPES, needs_native, on_every_path

from outrider.kernels.int8_linear import Int8Linear, int8_linear_reference, quantize_int8
from outrider.kernels.native import library


def layer(
    shape: tuple[int, int], dtype: torch.dtype, *, rows: int = 32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight with outputs of different sizes, bias and rows of input."""
    generator = torch.Generator().manual_seed(shape[0] * 10_000 + shape[1])
    sizes = torch.rand(shape[0], 1, generator=generator) + 0.01
    weight = (torch.randn(shape, generator=generator) * sizes).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    return weight, bias, torch.randn(rows, shape[1], generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_weight_is_within_half_a_scale_and_the_largest_is_whole(dtype: torch.dtype) -> None:
    weight, _, _ = layer((40, 50), dtype)
    weight[7] = 0
    weight[8] *= 1e-30
    quantized, scales = quantize_int8(weight)
    error = (quantized.double() * scales.double()[:, None] - weight.double()).abs()
    assert (error <= scales.double()[:, None] * 0.50001).all()
    largest = quantized.abs().amax(1)
    assert (largest == 127).sum() == 39
    assert largest[7] == 0
    assert (quantized.abs() <= 127).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_has_no_scale_is_refused(value: float) -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="cannot be quantised"):
        Int8Linear(weight)


@on_every_path
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_not_above_pytorchs_with_the_same_weights(dtype: torch.dtype) -> None:
    # PyTorch is given the weights as float32 numbers, and its result is rounded like ours.
    for shape in ((640, 384), (384, 1024), (4096, 192)):
        weight, bias, x = layer(shape, dtype)
        quantized, scales = quantize_int8(weight)
        dequantized = quantized.double() * scales.double()[:, None]
        linear = Int8Linear(weight, bias)
        for rows in (1, 4, 16, 32):
            want = F.linear(x[:rows].double(), dequantized, bias.double())
            ours = (linear(x[:rows]).double() - want).abs()
            plain = F.linear(x[:rows].float(), dequantized.float(), bias.float()).to(dtype)
            theirs = (plain.double() - want).abs()
            assert ours.mean() <= 1.02 * theirs.mean(), (shape, rows)
            slack = want.abs().max() * torch.finfo(dtype).eps / 4
            assert ours.max() <= 1.02 * theirs.max() + slack, (shape, rows)


@on_every_path
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("threads")
def test_a_rows_bits_do_not_depend_on_its_company(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, bias, x = layer(shape, dtype)
    linear = Int8Linear(weight, bias)
    torch.set_num_threads(1)
    alone = torch.cat([linear(row[None]) for row in x])
    reference = int8_linear_reference(x, *quantize_int8(weight), bias)
    # Rows of integers are off by a share of their largest number.
    slack = 1e-4 * float(reference.abs().max()) if dtype is torch.bfloat16 else 2e-4
    torch.testing.assert_close(alone, reference, atol=slack, rtol=2 * torch.finfo(dtype).eps)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in range(1, 33):
            for first in sorted({0, 1, (32 - rows) // 2, 32 - rows}):
                taken = x[first : first + rows]
                assert torch.equal(linear(taken), alone[first : first + rows]), (threads, rows, first)
        many = torch.cat((x, x[:5], x))
        assert torch.equal(linear(many), torch.cat((alone, alone[:5], alone)))


@on_every_path
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 41), (64, 64), (5, 3)])
def test_infinities_and_nans_go_where_the_reference_has_them(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight, bias, x = layer(shape, dtype)
    weight[:, 1] = 0
    x[3, 0] = torch.inf
    x[4, -1] = torch.nan
    x[5, 0], x[5, 2] = torch.inf, -torch.inf
    x[6, 1] = -torch.inf  # times zero
    want = int8_linear_reference(x, *quantize_int8(weight), bias)
    got = Int8Linear(weight, bias)(x)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[want.isinf()], want[want.isinf()])
    assert torch.equal(got.isinf(), want.isinf())
    assert got[7:].isfinite().all()
    assert want[3].isinf().any()


@on_every_path
def test_rows_of_any_size_are_computed() -> None:
    # The largest and smallest have no scale as integers, and nor have sums over so many inputs.
    weight, bias, x = layer((33, 41), torch.bfloat16)
    for row, size in enumerate((0.0, 1e-38, 1e-33, 1e-20, 1e20, 1e33)):
        x[row] *= size
    want = int8_linear_reference(x, *quantize_int8(weight)).double()
    error = (Int8Linear(weight)(x).double() - want).abs().amax(1)
    assert (error <= want.abs().amax(1) / 200).all()
    weight, bias, x = layer((3, 70_000), torch.bfloat16, rows=2)
    x[1] = weight[0].sign()  # the largest sum that such rows can have
    want = int8_linear_reference(x, *quantize_int8(weight), bias)
    torch.testing.assert_close(Int8Linear(weight, bias)(x), want, atol=0.5, rtol=0.02)


@on_every_path
@pytest.mark.parametrize("inputs", [512, 516, 1536, 40_000])
def test_the_largest_sums_that_rows_and_weights_can_have_are_right(inputs: int) -> None:
    signs = torch.randn(3, inputs).sign().to(torch.bfloat16)
    got = Int8Linear(signs / 8)(signs)
    assert got.diagonal().tolist() == pytest.approx([inputs / 8] * 3, rel=2**-8)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_strange_inputs_are_taken_or_refused(dtype: torch.dtype) -> None:
    weight, bias, x = layer((64, 30), dtype)
    linear = Int8Linear(weight, bias)
    assert linear.packed
    assert torch.equal(linear(torch.cat((x, x), dim=1)[:, :30]), linear(x))
    assert torch.equal(Int8Linear(weight.T.contiguous().T, bias)(x), linear(x))
    assert linear(x[:0]).shape == (0, 64)
    for wrong in (x[:, :29], x.double(), x[None], x.to("meta")):
        with pytest.raises(ValueError, match="for torch"):
            linear(wrong)


def test_float64_is_the_references() -> None:
    weight, bias, x = layer((33, 7), torch.float64)
    linear = Int8Linear(weight, bias)
    assert not linear.packed
    assert torch.equal(linear(x), int8_linear_reference(x, *quantize_int8(weight), bias))


WITHOUT_THE_MODULE = """
import torch
from outrider.kernels.int8_linear import Int8Linear, int8_linear_reference, quantize_int8
weight, x = torch.randn(64, 32), torch.randn(3, 32)
for dtype in (torch.bfloat16, torch.float32):
    linear, rows = Int8Linear(weight.to(dtype)), x.to(dtype)
    assert torch.equal(linear(rows), int8_linear_reference(rows, *quantize_int8(weight.to(dtype))))
    print(linear.packed)
"""


def test_without_the_module_the_reference_computes_and_one_line_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_MODULE],
        env=os.environ | {library.VARIABLE: "off"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False"]
    assert done.stderr.count("native linear layers are switched off") == 1
