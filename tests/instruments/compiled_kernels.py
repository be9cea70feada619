"""Compiles the Triton kernels for devices that need not be there: ``python -m instruments.compiled_kernels``.

The interpreter runs what the compiler would refuse: types that do not match, sizes that are no powers of
two, more shared memory than there is. Here the very wrappers are called, and what they would launch is
compiled down to machine code instead. Nothing is computed.
"""

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from instruments.paged_batches import BLOCK, Text, paged_batch
from outrider.kernels.gpu import gumbel, pointwise
from outrider.kernels.gpu.kv_move import kv_move
from outrider.kernels.gpu.path_attention import path_attention
from outrider.kernels.gpu.rotary import rotate_and_write
from outrider.kernels.gpu.tree_attention import tree_attention

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
SCALARS = {int: "i32", float: "fp32"}
OPTIONS = {"num_warps", "num_stages"}
SHARED_BYTES = 99 * 1024
"""Of the device with the least among those that are newer than compute capability 8.0."""


class Compiling:
    """Stands in for the launching of kernels; ``compiled`` names what was compiled."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.compiled: set[str] = set()

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        del grid, warmup
        options = {name: named.pop(name) for name in OPTIONS & named.keys()}
        given = dict(zip(kernel.arg_names, args, strict=False)) | named
        fixed = {param.name: given[param.name] for param in kernel.params if param.is_constexpr}
        signature = {name: "constexpr" if name in fixed else _kind(given[name]) for name in kernel.arg_names}
        # Tensors begin at multiples of 16 bytes, and are loaded in vectors where the kernel may know.
        aligned = {
            (param.num,): [["tt.divisibility", 16]]
            for param in kernel.params
            if signature[param.name].startswith("*") and not param.do_not_specialize_on_alignment
        }
        source = ASTSource(kernel, signature, fixed, aligned)
        made = triton.compile(source, target=self.target, options=options)
        assert made.metadata.shared <= SHARED_BYTES, (kernel.__name__, fixed, made.metadata.shared)
        self.compiled.add(kernel.__name__)


def _kind(value: Any) -> str:
    return POINTERS[value.dtype] if isinstance(value, torch.Tensor) else SCALARS[type(value)]


def launch_attention(shape: tuple[int, int, int], dtype: torch.dtype, text: Text) -> None:
    batch = paged_batch([text], shape, dtype)
    tree_attention(batch.q, batch.pool, batch.tree, BLOCK)
    path_attention(batch.q, batch.pool, batch.paths, BLOCK)


def launch_the_rest(dtype: torch.dtype) -> None:
    x, weight = torch.zeros(3, 4096, dtype=dtype), torch.zeros(4096, dtype=dtype)
    pointwise.rms_norm(x, weight, 1e-5)
    pointwise.rms_norm(x, weight, 1e-5, x)
    pointwise.silu_mul(x)
    H, G, D = 6, 2, 80
    heads, norm = torch.zeros(3, (H + 2 * G) * D, dtype=dtype), torch.zeros(H + G, D)
    turns = torch.ones(3, 2, D // 2, dtype=torch.complex64)
    slots, pool = torch.arange(3), torch.zeros(2, 9, 2, G, D, dtype=dtype)
    rotate_and_write(heads, norm, 1e-5, turns, slots, pool[0])
    rotate_and_write(heads, None, 1e-5, turns, slots, pool[0])
    kv_move(pool, slots, slots + 3)
    wide = torch.float64 if dtype is torch.float32 else dtype
    gumbel.exponential_noise(slots, slots, 5000)
    gumbel.draw(torch.zeros(3, 5000, dtype=wide), slots, slots)


def main(capabilities: list[str]) -> None:
    for capability in capabilities:
        compiling = Compiling(int(capability))
        triton.JITFunction.run = lambda kernel, *args, _to=compiling, **named: _to.run(kernel, *args, **named)
        launch_attention((6, 2, 256), torch.bfloat16, Text(committed=600, chunk=12))
        launch_attention((2, 2, 80), torch.float32, Text(committed=40, parents=[-1, 0]))
        for dtype in (torch.bfloat16, torch.float32):
            launch_the_rest(dtype)
        print(capability, *sorted(compiling.compiled))


if __name__ == "__main__":
    main(sys.argv[1:])
