"""Linear layers of the 121M target and of the draft: native, ``F.linear`` and oneDNN's packed weights.

    python benchmarks/kernels.py [--dtype bfloat16|float32] [--rows 1,4,8,16,64] [--paths amx,avx512]
                                 [--threads 1]

Every layer has weights of its own, as many as the model has blocks, and all of them are gone
through before one is used again: the target's come from memory, the draft's from a cache. Ways
take turns; of each, the 10 % quantile over the turns is taken. GB/s are bytes of weights over
time, to be read beside what summing memory reaches, in pages of 4 KiB and in huge ones.

Set ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 to see oneDNN as it is used where the native kernels are
missing; by default it may use AMX, with which a row's bits depend on the number of rows.
"""

import argparse
import mmap
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import conditions, finish, seconds_of

from outrider.kernels.linear import Linear, can_pack_with_onednn
from outrider.kernels.native import library
from outrider.models.config import ModelConfig, load_config
from outrider.models.demo import pair

Call = Callable[[torch.Tensor], torch.Tensor]
TARGET_BLOCKS = 76
"""Blocks of the demo target inflated to 120M parameters."""


def layers(config: ModelConfig, blocks: int) -> dict[str, tuple[int, int, int]]:
    """Outputs, inputs and number of each linear layer of a model."""
    heads, inner, hidden = config.num_heads * config.head_dim, config.intermediate_size, config.hidden_size
    return {
        "qkv": (heads + 2 * config.num_kv_heads * config.head_dim, hidden, blocks),
        "output": (hidden, heads, blocks),
        "gate_up": (2 * inner, hidden, blocks),
        "down": (hidden, inner, blocks),
        "head": (config.vocab_size, hidden, 1),
    }


def ways(weight: torch.Tensor, paths: list[str]) -> dict[str, Call]:
    """The same layer, each way with its own copy of the weights."""
    calls: dict[str, Call] = {"F.linear": partial(F.linear, weight=weight)}
    if can_pack_with_onednn(weight):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        calls["oneDNN"] = lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    if paths:
        calls |= dict.fromkeys(paths, Linear(weight))
    return calls


def once(calls: list[Call], x: torch.Tensor) -> None:
    for call in calls:
        call(x)


def measure(
    shape: tuple[int, int, int], rows: list[int], paths: list[str], args: argparse.Namespace
) -> dict[int, dict[str, float]]:
    """Microseconds per call, by number of rows and way."""
    outs, ins, count = shape
    dtype = getattr(torch, args.dtype)
    copies = [ways(torch.randn(outs, ins).to(dtype), paths) for _ in range(count)]
    inputs = {n: torch.randn(n, ins).to(dtype) for n in rows}
    repeats = max(1, 30 // count)  # short passes are repeated, so that the clock does not matter
    times: dict[int, dict[str, list[float]]] = {n: {way: [] for way in copies[0]} for n in rows}
    for turn in range(args.turns + 1):
        for n in rows:
            for way in copies[0]:
                if way in paths:
                    native().select(way)
                calls = [copy[way] for copy in copies] * repeats
                seconds = seconds_of(partial(once, calls, inputs[n])) / len(calls)
                if turn:  # the first one warms up
                    times[n][way].append(seconds * 1e6)
    return {
        n: {way: round(float(np.quantile(t, 0.1)), 2) for way, t in of_rows.items()}
        for n, of_rows in times.items()
    }


def native() -> Any:
    return library.load()


def read_bandwidth(huge: bool, size: int = 256 << 20) -> float:
    """GB/s of summing memory."""
    memory = mmap.mmap(-1, size)
    memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    numbers = torch.frombuffer(memory, dtype=torch.int64).fill_(1)
    return round(size / min(seconds_of(numbers.sum) for _ in range(7)) / 1e9, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", default="1,4,8,16,64")
    parser.add_argument("--paths", help="native ones; default: the fastest")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [int(n) for n in args.rows.split(",")]
    paths = args.paths.split(",") if args.paths else [native().selected()] if native() else []
    bandwidth = {"small pages": read_bandwidth(False), "huge pages": read_bandwidth(True)}
    print(f"read bandwidth, GB/s: {bandwidth}")
    result: dict[str, Any] = {}
    itemsize = getattr(torch, args.dtype).itemsize
    for model, folder, blocks in (("target", pair.TARGET, TARGET_BLOCKS), ("draft", pair.DRAFT, None)):
        config = load_config(folder)
        whole: dict[int, dict[str, float]] = {}
        for name, shape in layers(config, blocks or config.num_layers).items():
            outs, ins, count = shape
            times = measure(shape, rows, paths, args)
            result[f"{model} {name} {outs}x{ins}"] = times
            for n, of_rows in times.items():
                figures = "  ".join(
                    f"{way} {us:.1f} us, {outs * ins * itemsize / us / 1e3:.1f} GB/s"
                    for way, us in of_rows.items()
                )
                print(f"{model} {name} {outs}x{ins}, {n} rows: {figures}")
                for way, us in of_rows.items():
                    of_model = whole.setdefault(n, {})
                    of_model[way] = round(of_model.get(way, 0.0) + us * count, 2)
        result[f"{model}, all linear layers, us"] = whole
        for n, of_rows in whole.items():
            figures = "  ".join(
                f"{way} {us / 1e3:.2f} ms ({of_rows['F.linear'] / us:.2f})" for way, us in of_rows.items()
            )
            print(f"{model}, all linear layers, {n} rows (F.linear over it): {figures}")
    finish({"us": result, "bandwidth": bandwidth, **conditions(dtype=args.dtype, turns=args.turns)})


if __name__ == "__main__":
    main()
