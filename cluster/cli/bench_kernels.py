"""``outrider bench kernels``: what the kernels reach on this machine."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from outrider.cluster.cli.arguments import Commands, integer
from outrider.speculation.errors import InvalidConfigError

if TYPE_CHECKING:
    from outrider.cluster.bench.kernels import Measured
    from outrider.cluster.bench.machine import Limits
    from outrider.models.config import ModelConfig

NAME = "kernels"
SUMMARY = "linear layers, attention and the rest, each beside what computes the same without it"

DESCRIPTION = """\
Measures every kernel in the shapes of a model, in turns with PyTorch's own or a plain reference:
linear layers in bfloat16, float32 and int8 for 1 to 32 rows, attention over short and long texts,
norms, rotation, SiLU and sampling. Times are medians; bytes and operations per second stand beside
what copying memory and multiplying in cache reach here. Nothing else should run meanwhile.

OUTRIDER_CPU_KERNEL chooses another instruction set than the fastest (docs/numerics.md).
"""

EXAMPLES = """\
examples:
  outrider bench kernels
  outrider bench kernels --quick --model ./target --threads 4
  outrider bench kernels --json > kernels.json
"""

_SHORT = {"bfloat16": "bf16", "float32": "fp32"}

DEEPER = 120_000_000
"""Parameters of the second model that is measured by default."""


def register(commands: Commands) -> None:
    """Adds the benchmark's parser."""
    parser = commands.add_parser(NAME, help=SUMMARY, description=DESCRIPTION, epilog=EXAMPLES)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "--model",
        metavar="DIR|ID",
        help="whose shapes; by default the embedded target's, as it is and with 120M parameters",
    )
    add("--threads", metavar="N", type=integer, default=1, help="CPU threads; default 1")
    add("--quick", action="store_true", help="fewer rows and turns, and all from caches: seconds, and rough")
    add("--json", action="store_true", help="print one JSON object")
    add("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints."""
    if arguments.threads < 1:
        raise InvalidConfigError(f"threads must be at least 1, not {arguments.threads}")
    import torch

    from outrider.cluster.bench.kernels import FULL, QUICK, count, measure
    from outrider.cluster.bench.machine import description, measured_limits
    from outrider.cluster.cli.output import Bar

    models = _models(arguments.model)
    torch.set_num_threads(arguments.threads)
    plan = QUICK if arguments.quick else FULL
    limits = measured_limits()
    results: list[Measured] = []
    bar = Bar("measuring", sum(count(config, plan) for config in models.values()))
    try:
        for name, config in models.items():
            for each in measure(name, config, plan, limits):
                results.append(each)
                bar.show(len(results))
    finally:
        bar.close()
    machine = description()
    if arguments.json:
        print(
            json.dumps({**machine, "limits": asdict(limits), "kernels": [asdict(each) for each in results]})
        )
    else:
        _print(results, limits)
    return 0


def _models(given: str | None) -> "dict[str, ModelConfig]":
    from outrider.cluster.bench.kernels import deeper
    from outrider.models.config import load_config
    from outrider.models.demo import pair
    from outrider.models.resolve import resolve_model

    if given is not None:
        folder = resolve_model(given)
        return {folder.name: load_config(folder)}
    config = load_config(pair.TARGET)
    return {"demo target": config, "120M": deeper(config, DEEPER)}


def _print(results: "Sequence[Measured]", limits: "Limits") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for model in dict.fromkeys(each.model for each in results):
        # Narrow enough for 80 columns.
        table = Table(box=None, title=model, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
        for heading in ("kernel", "type"):
            table.add_column(heading, no_wrap=True)
        for heading in ("rows", "µs", "reference", "ratio", "GB/s", "copy", "Gop/s", "peak"):
            table.add_column(heading, justify="right", no_wrap=True)
        for each in results:
            if each.model == model:
                table.add_row(*_row(each))
        console.print(table, "")
    console.print(
        f"copy: share of {limits.copy / 1e9:.1f} GB/s, a copy in memory; "
        f"peak: share of {limits.operations / 1e9:.0f} Gop/s, products in cache",
        soft_wrap=True,
    )


def _row(each: "Measured") -> tuple[str, ...]:
    return (
        each.name,
        _SHORT.get(each.dtype, each.dtype),
        str(each.rows),
        f"{each.ours_us:.1f}",
        f"{each.reference_us:.1f}",
        f"{each.ratio:.2f}",
        f"{each.bytes_per_second / 1e9:.1f}",
        f"{each.of_copy:.0%}",
        f"{each.operations_per_second / 1e9:.1f}",
        f"{each.of_peak:.0%}",
    )
