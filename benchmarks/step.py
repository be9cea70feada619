"""One step of a decoder against a lean one of PyTorch, and what else it is worth being compared with.

    python benchmarks/step.py [--parameters 120M] [--rows 1 4 8 16 32] [--context 256] [--turns 15]

The embedded target, inflated, and the embedded draft model, in bfloat16. A step is all that a decoder does
for so many rows below a text, from laying out the batch to logits. It is compared with a step of PyTorch's
operators (``lean_loop.py``), and linear layers with a loop that calls ``F.linear`` for every one of them and
does nothing else. What is compared takes turns, on one thread; ratios are those of each turn. Nothing else
should run meanwhile. The draft's step is also compared with what it takes without native kernels, by PyTorch
alone, in processes of their own that take turns.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import conditions, finish
from lean_loop import LeanLoop

from outrider.actors.model_runner import ModelRunner
from outrider.actors.runner import TreeQuery
from outrider.cluster.bench.machine import measured_limits, seconds_of
from outrider.kernels.linear import Linear
from outrider.kernels.native import library
from outrider.models.batch import text_rows, tree_rows
from outrider.models.block_pool import blocks_for
from outrider.models.decoder_loader import load_decoder
from outrider.models.demo import pair
from outrider.models.inflate import inflated, parse_count
from outrider.models.kv_cache import KVSequence
from outrider.models.numerics import MAX_ROWS, Numerics
from outrider.models.parallel import ALONE

Way = Callable[[], object]
DRAFT_ROWS = 4
PROCESSES = 5
CANONICAL, FAST = Numerics.CANONICAL, Numerics.FAST


class Model:
    """A network with a text in its cache."""

    def __init__(
        self, folder: Path, context: int, *, numerics: Numerics = CANONICAL, quantization: str | None = None
    ) -> None:
        self.decoder = load_decoder(
            folder,
            dtype="bfloat16",
            numerics=numerics,
            max_model_len=context + 2 * MAX_ROWS,
            ranks=ALONE,
            quantization=quantization,
        )
        self.linears = [linear for block in self.decoder.blocks for linear in block.linears]
        self.linears.append(self.decoder.head)
        self.bytes = sum(2 * outs * ins for outs, ins in (linear.shape for linear in self.linears))
        self.read = sum(linear.nbytes for linear in self.linears)
        self._runner = ModelRunner(self.decoder, num_blocks=blocks_for(context + 2 * MAX_ROWS))
        self._text = KVSequence(self._runner.cache)
        self._text.reserve(context + MAX_ROWS)
        tokens = self.tokens = np.arange(context) % self.decoder.config.vocab_size
        for start in range(0, context, MAX_ROWS):
            piece = tokens[start : start + MAX_ROWS]
            self._runner.verify([TreeQuery(sequence=self._text, tokens=piece, tree=None)])

    def step(self, rows: int) -> torch.Tensor:
        """Logits of a token and of a chain of nodes below it; the text stays as it is."""
        tokens = np.arange(rows)
        if rows == 1:
            part = text_rows(self._text, tokens, first_logit_row=0)
        else:
            part = tree_rows(self._text, tokens[:1], tokens[1:], tokens[1:] - 2, tokens[1:])
        return self._runner.forward([part])


class LinearLoops:
    """Every linear layer of a model: with ``F.linear``, and as the model has it."""

    def __init__(self, model: Model) -> None:
        self._ours = model.linears
        self._weights = [torch.randn(linear.shape).to(torch.bfloat16) for linear in model.linears]

    def ways(self, rows: int) -> tuple[Way, Way]:
        shapes = [weight.shape for weight in self._weights]
        inputs = {ins: torch.randn(rows, ins).to(torch.bfloat16) for _, ins in shapes}
        outputs = {outs: torch.empty(rows, outs, dtype=torch.bfloat16) for outs, _ in shapes}
        calls = [_call(linear, inputs, outputs) for linear in self._ours]

        def plain() -> None:
            for weight in self._weights:
                F.linear(inputs[weight.shape[1]], weight)

        def ours() -> None:
            for call in calls:
                call()

        return plain, ours


def _call(linear: Linear, inputs: dict[int, torch.Tensor], outputs: dict[int, torch.Tensor]) -> Way:
    """With as little of Python as a step has, which calls the native kernel from C++."""
    outs, ins = linear.shape
    x, y = inputs[ins], outputs[outs]
    native = linear.native
    if native is None:
        return partial(linear, x)
    return lambda: native(x.data_ptr(), y.data_ptr(), len(x), 1)


@torch.inference_mode()
def taking_turns(ways: dict[str, Way], turns: int) -> dict[str, np.ndarray]:
    """Milliseconds of every way in every turn; the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns + 1):
        for name, way in ways.items():
            times[name].append(seconds_of(way) * 1e3)
    return {name: np.array(each[1:]) for name, each in times.items()}


def on_threads(count: int, way: Way) -> None:
    torch.set_num_threads(count)
    way()
    torch.set_num_threads(1)


def compared(ways: dict[str, Way], ratios: dict[str, tuple[str, str]], turns: int) -> dict[str, Any]:
    """Medians of times, and of ratios ``{name: (numerator, denominator)}`` turn by turn."""
    times = taking_turns(ways, turns)
    return {
        "ms": {name: round(float(np.median(each)), 3) for name, each in times.items()},
        **{name: round(float(np.median(times[a] / times[b])), 3) for name, (a, b) in ratios.items()},
    }


def lean_loop(folder: Path, model: Model, args: argparse.Namespace) -> LeanLoop:
    """Below the same text; that it computes the same is seen by its first choice for each row."""
    rows = max(args.rows)
    lean = LeanLoop(folder, args.context, rows)
    lean.fill(torch.from_numpy(model.tokens))
    same = (lean.step(torch.arange(rows)).argmax(1) == model.step(rows).argmax(1)).float().mean()
    print(f"rows for which PyTorch's step has the same first choice: {same:.0%}")
    return lean


def of_target(folder: Path, args: argparse.Namespace, copy: float) -> dict[str, Any]:
    model, fast = Model(folder, args.context), Model(folder, args.context, numerics=FAST)
    loops, lean, by_rows = LinearLoops(model), lean_loop(folder, model, args), {}
    for rows in args.rows:
        plain, linears = loops.ways(rows)
        figures = compared(
            {
                "PyTorch": partial(lean.step, torch.arange(rows)),
                "F.linear": plain,
                "linears": linears,
                "step": partial(model.step, rows),
            },
            {
                "step over PyTorch": ("PyTorch", "step"),
                "linears over F.linear": ("F.linear", "linears"),
                "step over F.linear": ("F.linear", "step"),
                "linears' share of a step": ("linears", "step"),
            },
            args.turns,
        )
        figures["share of copy speed"] = round(model.read / figures["ms"]["linears"] * 1e3 / copy, 3)
        by_rows[rows] = figures
        print(f"{rows} rows: {figures}")
    one = partial(model.step, 1)
    return {
        "bytes": model.bytes,
        "bytes read": model.read,
        "rows": by_rows,
        "threads": compared(
            {"one": one, "two": partial(on_threads, 2, one)}, {"two over one": ("one", "two")}, args.turns
        ),
        "numerics": compared(
            {"canonical": partial(model.step, 8), "fast": partial(fast.step, 8)},
            {"price of canonical": ("canonical", "fast")},
            3 * args.turns,
        ),
    }


def of_draft(args: argparse.Namespace, copy: float) -> dict[str, Any]:
    model = Model(pair.DRAFT, args.context)
    int8 = Model(pair.DRAFT, args.context, quantization="int8")
    plain, linears = LinearLoops(model).ways(DRAFT_ROWS)
    step, turns = partial(model.step, DRAFT_ROWS), 20 * args.turns
    figures = compared(
        {"F.linear": plain, "linears": linears, "bfloat16": step},
        {"step over F.linear": ("F.linear", "bfloat16"), "linears' share of a step": ("linears", "bfloat16")},
        turns,
    )
    # By themselves: a step that comes after loops finds its code out of the caches.
    of_eight_bits = compared(
        {"bfloat16": step, "int8": partial(int8.step, DRAFT_ROWS)},
        {"int8 over bfloat16": ("bfloat16", "int8")},
        turns,
    )
    allowed = 3e3 * model.bytes / copy + 0.15
    return {
        "rows": DRAFT_ROWS,
        "bytes": model.bytes,
        "3 times its bytes and 150 us, ms": round(allowed, 3),
        **figures,
        "of eight bits": of_eight_bits,
    }


def draft_step_ms(args: argparse.Namespace) -> float:
    """The draft's step alone."""
    step = partial(Model(pair.DRAFT, args.context).step, DRAFT_ROWS)
    return float(np.median(taking_turns({"step": step}, 20 * args.turns)["step"]))


def without_kernels(args: argparse.Namespace) -> dict[str, Any]:
    """The draft's step with native kernels and without."""
    ways = {"native": "", "PyTorch": "off"}
    ms: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(PROCESSES):
        for name, kernel in ways.items():
            done = subprocess.run(
                [sys.executable, __file__, "--draft-step", "--context", str(args.context)],
                env=os.environ | {library.VARIABLE: kernel},
                stdout=subprocess.PIPE,
                check=True,
            )
            ms[name].append(float(done.stdout))
    ratios = [plain / native for native, plain in zip(ms["native"], ms["PyTorch"], strict=True)]
    return {"ms": ms, "native over PyTorch": round(statistics.median(ratios), 3)}


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """Which steps of the inflated target are timed, and how often."""
    parser.add_argument("--parameters", type=parse_count, default=120 * 10**6)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--turns", type=int, default=15)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_step_arguments(parser)
    parser.add_argument("--draft-step", action="store_true", help="only print the draft's milliseconds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.draft_step:
        print(draft_step_ms(args))
        return
    limits = measured_limits()
    with inflated(pair.TARGET, args.parameters) as folder:
        target = of_target(folder, args, limits.copy)
    for name in ("threads", "numerics"):
        print(f"{name}: {target[name]}")
    draft = of_draft(args, limits.copy)
    draft["without kernels"] = without_kernels(args)
    print(f"draft: {draft}")
    finish(
        {
            "target": target,
            "draft": draft,
            **conditions(dtype="bfloat16", context=args.context, copy_bytes_per_second=limits.copy),
        }
    )


if __name__ == "__main__":
    main()
