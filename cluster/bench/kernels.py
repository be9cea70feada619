"""Kernels as a model uses them, each beside what computes the same without it.

The two take turns, and the medians of their times are compared. A kernel's weights, or keys, have as many
copies as the model has layers, as far as memory is granted, and all of them are gone through before one is
used again: what a model reads from memory is read from memory here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from outrider.cluster.bench.machine import Limits, seconds_of
from outrider.kernels.gumbel import draw, stream_keys
from outrider.kernels.int8_linear import Int8Linear, int8_linear_reference, quantize_int8
from outrider.kernels.linear import Linear
from outrider.kernels.native import library
from outrider.kernels.path_attention import PathAttention, PathKeys, path_attention_reference
from outrider.kernels.pointwise import rms_norm, silu_mul
from outrider.kernels.rotary import rotate_and_write_reference
from outrider.models.block_pool import BLOCK
from outrider.models.config import ModelConfig

Call = Callable[[], Any]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
INT8 = "int8"
"""Weights of eight bits, rows of bfloat16."""
REPEATED = 12
"""Calls in a measured pass, at least, so that the clock does not matter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Numbers of rows, contexts in tokens, turns, and bytes of all copies of a kernel's data."""

    rows: Sequence[int]
    contexts: Sequence[int]
    turns: int
    copied_bytes: int


FULL = Plan(rows=(1, 4, 8, 16, 32), contexts=(128, 1024), turns=11, copied_bytes=64 << 20)
QUICK = Plan(rows=(1, 8), contexts=(256,), turns=3, copied_bytes=4 << 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel for so many rows. ours, reference: the calls of a pass.

    name: with its sizes. dtype: ``int8`` for such weights. moved: bytes that our call must read and write.
    operations: a multiplication and an addition are two.
    """

    name: str
    dtype: str
    rows: int
    moved: int
    operations: int
    ours: Sequence[Call]
    reference: Sequence[Call]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Medians. ours_us, reference_us: of a call. ratio: the reference's time over ours, turn by turn.

    bytes_per_second, operations_per_second: of ours. of_copy, of_peak: their shares of the machine's limits.
    """

    model: str
    name: str
    dtype: str
    rows: int
    ours_us: float
    reference_us: float
    ratio: float
    bytes_per_second: float
    operations_per_second: float
    of_copy: float
    of_peak: float


def count(config: ModelConfig, plan: Plan) -> int:
    """How many cases there are for a model."""
    per_rows = len(_linears(config)) * (len(DTYPES) + 1)
    native = library.layers(torch.empty(0)) is not None
    # Norm, SiLU and sampling; with the native module rotation and attention.
    return len(plan.rows) * (per_rows + 3 + (1 + len(plan.contexts) if native else 0))


@torch.inference_mode()
def measure(model: str, config: ModelConfig, plan: Plan, limits: Limits) -> Iterator[Measured]:
    """Every kernel for every number of rows, one after the other."""
    for case in _cases(config, plan):
        ours, theirs = _times(case, plan.turns)
        seconds = float(np.median(ours))
        yield Measured(
            model=model,
            name=case.name,
            dtype=case.dtype,
            rows=case.rows,
            ours_us=seconds * 1e6,
            reference_us=float(np.median(theirs)) * 1e6,
            ratio=float(np.median(theirs / ours)),
            bytes_per_second=case.moved / seconds,
            operations_per_second=case.operations / seconds,
            of_copy=case.moved / seconds / limits.copy,
            of_peak=case.operations / seconds / limits.operations,
        )


def deeper(config: ModelConfig, parameters: int) -> ModelConfig:
    """The same with so many more layers that it has at least this number of parameters, norms left out."""
    of_block = sum(outs * ins for name, outs, ins in _linears(config) if name != "head")
    fixed = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return replace(config, num_layers=-(-(parameters - fixed) // of_block))


def _times(case: Case, turns: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of a call in each turn, of both."""
    ways = case.ours, case.reference
    repeats = max(1, REPEATED // len(case.ours))
    times = np.empty((2, turns + 1))
    for turn in range(turns + 1):
        for way, calls in enumerate(ways):
            times[way, turn] = seconds_of(partial(_pass, calls, repeats)) / (repeats * len(calls))
    # The first turn warms up.
    return times[0, 1:], times[1, 1:]


def _pass(calls: Sequence[Call], repeats: int) -> None:
    for _ in range(repeats):
        for call in calls:
            call()


def _linears(config: ModelConfig) -> list[tuple[str, int, int]]:
    """Name, outputs and inputs of each linear layer."""
    heads, inner, hidden = config.num_heads * config.head_dim, config.intermediate_size, config.hidden_size
    return [
        ("qkv", heads + 2 * config.num_kv_heads * config.head_dim, hidden),
        ("output", hidden, heads),
        ("gate_up", 2 * inner, hidden),
        ("down", hidden, inner),
        ("head", config.vocab_size, hidden),
    ]


def _cases(config: ModelConfig, plan: Plan) -> Iterator[Case]:
    dtype = config.dtype if config.dtype in DTYPES else "float32"
    for name, outs, ins in _linears(config):
        for kind in (*DTYPES, INT8):
            yield from _of_linear(f"{name} {outs}x{ins}", kind, (outs, ins), config, plan)
    for rows in plan.rows:
        yield _norm(dtype, rows, config)
        yield _silu(dtype, rows, config)
    if library.layers(torch.empty(0)) is not None:
        yield from _of_attention(dtype, config, plan)
    for rows in plan.rows:
        yield _sampling(rows, config)


def _copies(size: int, config: ModelConfig, plan: Plan) -> int:
    return max(1, min(config.num_layers, plan.copied_bytes // size))


def _of_linear(
    name: str, kind: str, shape: tuple[int, int], config: ModelConfig, plan: Plan
) -> Iterator[Case]:
    dtype = DTYPES["bfloat16" if kind == INT8 else kind]
    weight_bytes = shape[0] * shape[1] * (1 if kind == INT8 else dtype.itemsize)
    copies = 1 if name.startswith("head ") else _copies(weight_bytes, config, plan)
    weights = [torch.randn(shape).to(dtype) for _ in range(copies)]
    plain: list[Callable[[torch.Tensor], torch.Tensor]]
    if kind == INT8:
        layers: list[Linear] = [Int8Linear(weight) for weight in weights]
        plain = [_int8_reference(weight) for weight in weights]
    else:
        layers = [Linear(weight) for weight in weights]
        plain = [partial(F.linear, weight=weight) for weight in weights]
    for rows in plan.rows:
        x = torch.randn(rows, shape[1]).to(dtype)
        yield Case(
            name=name,
            dtype=kind,
            rows=rows,
            moved=layers[0].nbytes + rows * sum(shape) * dtype.itemsize,
            operations=2 * rows * shape[0] * shape[1],
            ours=[partial(layer, x) for layer in layers],
            reference=[partial(layer, x) for layer in plain],
        )


def _int8_reference(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    quantized, scales = quantize_int8(weight)
    return lambda x: int8_linear_reference(x, quantized, scales)


def _norm(dtype: str, rows: int, config: ModelConfig) -> Case:
    size = config.hidden_size
    x, weight = torch.randn(rows, size).to(DTYPES[dtype]), torch.ones(size, dtype=DTYPES[dtype])
    add, eps = torch.zeros_like(x), config.rms_norm_eps

    def plain() -> None:
        x.add_(add)
        F.rms_norm(x, (size,), weight, eps)

    return Case(
        name=f"residual, norm {size}",
        dtype=dtype,
        rows=rows,
        moved=4 * rows * size * x.element_size(),
        operations=5 * rows * size,
        ours=[partial(rms_norm, x, weight, eps, add)],
        reference=[plain],
    )


def _silu(dtype: str, rows: int, config: ModelConfig) -> Case:
    size = config.intermediate_size
    gate_up = torch.randn(rows, 2 * size).to(DTYPES[dtype])
    return Case(
        name=f"silu_mul {size}",
        dtype=dtype,
        rows=rows,
        moved=3 * rows * size * gate_up.element_size(),
        operations=5 * rows * size,
        ours=[partial(silu_mul, gate_up)],
        reference=[lambda: F.silu(gate_up[:, :size]) * gate_up[:, size:]],
    )


def _sampling(rows: int, config: ModelConfig) -> Case:
    vocab = config.vocab_size
    probs = torch.randn(rows, vocab).softmax(1)
    base, gamma = torch.from_numpy(stream_keys(0, np.arange(rows), 0))
    return Case(
        name=f"sampling from {vocab}",
        dtype="float32",
        rows=rows,
        moved=4 * rows * vocab,
        operations=2 * rows * vocab,
        ours=[partial(draw, probs, base, gamma)],
        reference=[partial(torch.multinomial, probs, 1)],
    )


def _of_attention(dtype: str, config: ModelConfig, plan: Plan) -> Iterator[Case]:
    for rows in plan.rows:
        # With one key to attend there is little but norms, rotation and writing.
        yield _attention(f"rotary, KV write {config.head_dim}", dtype, rows, 0, config, plan)
        for context in plan.contexts:
            yield _attention(f"attention over {context}", dtype, rows, context, config, plan)


def _attention(name: str, dtype: str, rows: int, context: int, config: ModelConfig, plan: Plan) -> Case:
    """The last rows of a text of ``context`` tokens; without a context each row is a text of its own."""
    H, G, D = config.num_heads, config.num_kv_heads, config.head_dim
    length = max(context, rows)
    blocks = -(-length // BLOCK)
    keys = _keys(rows, length, alone=not context)
    slots = torch.arange(length - rows, length)
    turns = torch.polar(torch.ones(rows, 2, D // 2), torch.randn(rows, 2, D // 2))
    heads = torch.randn(rows, (H + 2 * G) * D).to(DTYPES[dtype])
    norm = torch.ones(H + G, D) if config.qk_norm else None
    out, eps = heads.new_empty(rows, H * D), config.rms_norm_eps
    pool_bytes = blocks * BLOCK * 2 * G * D * heads.element_size()
    copies = _copies(pool_bytes, config, plan)
    pools = [torch.randn(blocks * BLOCK, 2, G, D).to(heads.dtype) for _ in range(copies)]
    native = library.layers(heads)
    assert native is not None
    positions = torch.arange(rows)
    ours = PathAttention(
        native, keys, turns=turns, positions=positions, slots=slots, shape=(H, G, D), block=BLOCK
    )

    def plain(pool: torch.Tensor) -> None:
        q = rotate_and_write_reference(heads, norm, eps, turns, slots, pool)
        if context:
            path_attention_reference(q.view(rows, G, H // G, D), pool, keys, BLOCK)

    attended = rows if not context else length
    return Case(
        name=name,
        dtype=dtype,
        rows=rows,
        moved=attended * 2 * G * D * heads.element_size() + heads.nbytes + out.nbytes,
        operations=4 * H * D * int((keys.seen - keys.first).sum()) + 6 * rows * (H + G) * D,
        ours=[partial(ours, heads, norm, eps, pool, out) for pool in pools],
        reference=[partial(plain, pool) for pool in pools],
    )


def _keys(rows: int, length: int, *, alone: bool) -> PathKeys:
    """What the last ``rows`` rows of a text attend: all before them and themselves, or, alone, themselves."""
    seen = np.arange(length - rows, length) + 1
    return PathKeys(
        tables=np.arange(-(-length // BLOCK)),
        table_starts=np.zeros(rows, np.int64),
        first=seen - 1 if alone else np.zeros(rows, np.int64),
        seen=seen,
        nodes=np.zeros(0, np.int64),
        node_starts=np.zeros(rows + 1, np.int64),
    )
