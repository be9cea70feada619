"""``outrider simulate``: what speculation would bring, without models or machines."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.cluster.cli.arguments import Commands, Parser, integer, real
from outrider.speculation.errors import InvalidConfigError

if TYPE_CHECKING:
    from outrider.cluster.simulated_table import Cell, Estimate
    from outrider.cluster.simulator import Costs
    from outrider.speculation.pipelines.shape import TreeShape

NAME = "simulate"
SUMMARY = "predict speed-ups from acceptance and step times, without models"

DESCRIPTION = """\
Runs the engine's own decisions on a simulated clock and prints what comes out.

Without --acceptance it prints a table of speed-ups over plain decoding. With it, and with the
times of a target and a drafter, it predicts these two.
"""

EXAMPLES = """\
examples:
  outrider simulate
  outrider simulate --acceptance 0.9,0.06,0.02 --target-ms 14 --draft-ms 1.2 --round-trip-ms 0.4
  outrider simulate --acceptance 0.7,0.1 --target-curve 14,14.2,14.9 --draft-ms 1.2,1.3 --json

docs/simulator.md says how to read the figures.
"""

TABLE_TOKENS, OWN_TOKENS = 300, 1000
SLOPE = 0.0094
TIMES = {
    "round_trip_ms": "messages from the target to the drafter and back; default 0",
    "target_overhead_ms": "of each target step beside its forward; default 0",
    "speculation_overhead_ms": "the same, with a drafter only; default 0",
    "commit_overhead_ms": "of the drafter for each commit; default 0",
}


def register(commands: Commands) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(NAME, help=SUMMARY, description=DESCRIPTION, epilog=EXAMPLES)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "--tokens",
        metavar="N",
        type=integer,
        help=f"of each of four runs; default {TABLE_TOKENS}, with --acceptance {OWN_TOKENS}",
    )
    add(
        "--seed", metavar="N", type=integer, default=0, help="the same seed gives the same figures; default 0"
    )
    add("--json", action="store_true", help="print one JSON object")
    add("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
    _add_pair(parser)
    _add_speculation(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the table, or the prediction for one pair."""
    if arguments.acceptance is None:
        _refuse_without_acceptance(arguments)
        return _run_table(arguments)
    return _run_own(arguments)


def _run_table(arguments: argparse.Namespace) -> int:
    from outrider.cluster import simulated_table
    from outrider.cluster.cli.output import Bar, print_rows

    tokens = TABLE_TOKENS if arguments.tokens is None else arguments.tokens
    total = len(simulated_table.ACCEPTANCES) * len(simulated_table.RATIOS) * len(simulated_table.POLICIES)
    bar = Bar("simulating", total)
    try:
        cells = list(simulated_table.table(tokens=tokens, seed=arguments.seed, progress=bar.show))
    finally:
        bar.close()
    if arguments.json:
        runs = {"tokens": tokens, "seed": arguments.seed, "runs": simulated_table.SEEDS}
        print(json.dumps({**runs, "cells": [_cell_object(cell) for cell in cells]}))
        return 0
    print_rows(
        "Speed-up over plain decoding",
        ["acceptance by rank", "c", "R", *simulated_table.POLICIES, "formula"],
        [_cell_row(cell) for cell in cells],
    )
    print(
        "\nc: a target step of one row in draft steps. R: the round trip, likewise.\n"
        "+- one standard error. In brackets: tree width / most verified nodes that won.\n"
        "never wait, linger: parallel held back never, or with one eagerness; parallel learns it.\n"
        "formula: PEARL's, with the first rank's acceptance and its best window."
    )
    return 0


def _run_own(arguments: argparse.Namespace) -> int:
    costs, shape = _costs(arguments), _shape(arguments)
    from outrider.cluster import simulated_table
    from outrider.cluster.cli.output import Bar, print_rows
    from outrider.speculation.pipelines.registry import PIPELINES

    tokens = OWN_TOKENS if arguments.tokens is None else arguments.tokens
    pipelines = list(PIPELINES) if arguments.pipeline is None else [arguments.pipeline]
    bar = Bar("simulating", len(pipelines) + 1)
    estimates = {}
    try:
        for pipeline in (None, *pipelines):
            estimates[pipeline or "plain"] = simulated_table.estimate(
                costs, pipeline, shape=shape, tokens=tokens, seed=arguments.seed
            )
            bar.show(len(estimates))
    finally:
        bar.close()
    objects = [_prediction_object(name, estimate) for name, estimate in estimates.items()]
    if arguments.json:
        print(json.dumps({"tokens": tokens, "seed": arguments.seed, "predictions": objects}))
    else:
        header = ["pipeline", "tokens/s", "speed-up", "mean acceptance length", "overlap", "target bubbles"]
        print_rows("Prediction", header, [_prediction_row(each) for each in objects])
    return 0


def _costs(arguments: argparse.Namespace) -> "Costs":
    curve = _target_curve(arguments)
    if arguments.draft_ms is None:
        raise InvalidConfigError("--acceptance needs the drafter's time: give --draft-ms")
    from outrider.cluster.simulator import Costs

    return Costs(
        acceptance=arguments.acceptance,
        target=_seconds(curve),
        draft=_seconds(arguments.draft_ms),
        contrast=arguments.contrast or 0.0,
        correlation=arguments.correlation or 0.0,
        **{name.removesuffix("_ms"): (getattr(arguments, name) or 0.0) / 1e3 for name in TIMES},
    )


def _target_curve(arguments: argparse.Namespace) -> Sequence[float]:
    """Milliseconds of a target step by rows."""
    if arguments.slope is not None and arguments.target_ms is None:
        raise InvalidConfigError(f"--slope {arguments.slope} needs --target-ms; a curve has its own")
    if arguments.target_curve is not None:
        curve: Sequence[float] = arguments.target_curve
    elif arguments.target_curve_file is not None:
        curve = _read_curve(arguments.target_curve_file)
    elif arguments.target_ms is not None:
        slope = SLOPE if arguments.slope is None else arguments.slope
        curve = (arguments.target_ms, arguments.target_ms * (1 + slope))
    else:
        raise InvalidConfigError(
            "--acceptance needs the target's time: give --target-ms, --target-curve or --target-curve-file"
        )
    return curve


def _read_curve(file: str) -> tuple[float, ...]:
    try:
        data = json.loads(Path(file).read_bytes())
    except OSError as error:
        raise InvalidConfigError(f"the curve file {file!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidConfigError(f"the curve file {file!r} is not JSON: {error}") from error
    try:
        if not isinstance(data, list):
            raise argparse.ArgumentTypeError(f"must be a list of milliseconds, not {str(data)[:60]!r}")
        return _curve(",".join(map(str, data)))
    except argparse.ArgumentTypeError as error:
        raise InvalidConfigError(f"the curve file {file!r} {error}") from None


def _shape(arguments: argparse.Namespace) -> "TreeShape":
    from outrider.speculation.pipelines.registry import PIPELINES
    from outrider.speculation.pipelines.shape import TreeShape

    if arguments.pipeline is not None and arguments.pipeline not in PIPELINES:
        raise InvalidConfigError(
            f"pipeline must be one of {', '.join(PIPELINES)}, not {arguments.pipeline!r}"
        )
    bounds: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("width", "num_speculative_tokens", "depth", "min_score")
        if getattr(arguments, name) is not None
    }
    return TreeShape(**bounds, children=len(arguments.acceptance))


def _refuse_without_acceptance(arguments: argparse.Namespace) -> None:
    shared = {"acceptance", "tokens", "seed", "json", "debug", "run"}
    for name, value in vars(arguments).items():
        if name not in shared and value is not None:
            flag = "--" + name.replace("_", "-")
            raise InvalidConfigError(f"{flag} needs --acceptance; the table has its own parameters")


def _seconds(milliseconds: Sequence[float]) -> tuple[float, ...]:
    return tuple(each / 1e3 for each in milliseconds)


def _cell_row(cell: "Cell") -> list[str]:
    chances = " ".join(f"{chance:.2f}".removeprefix("0") for chance in cell.acceptance)
    estimates = [
        f"{each.speed_up:.2f} +-{each.error:.2f} ({each.shape.width}/{each.shape.num_speculative_tokens})"
        for each in cell.policies.values()
    ]
    pearl = "" if cell.pearl is None else f"{cell.pearl:.2f}"
    return [chances, f"{cell.target:g}", f"{cell.round_trip:g}", *estimates, pearl]


def _cell_object(cell: "Cell") -> dict[str, object]:
    policies = {
        name: {
            "speed_up": each.speed_up,
            "standard_error": each.error,
            "width": each.shape.width,
            "num_speculative_tokens": each.shape.num_speculative_tokens,
        }
        for name, each in cell.policies.items()
    }
    return {
        "acceptance": cell.acceptance,
        "target": cell.target,
        "round_trip": cell.round_trip,
        **policies,
        "pearl_formula": cell.pearl,
    }


def _prediction_object(name: str, estimate: "Estimate") -> dict[str, Any]:
    from outrider.speculation.statistics import SpeculationStatistics

    stats = SpeculationStatistics()
    for each in estimate.runs:
        stats.merge(each.stats)
    seconds = sum(each.seconds for each in estimate.runs)
    return {
        "pipeline": name,
        "tokens_per_second": stats.num_output_tokens / seconds,
        "speed_up": estimate.speed_up,
        "standard_error": estimate.error,
        "mean_acceptance_length": stats.mean_acceptance_length,
        "overlap_ratio": stats.overlap_ratio,
        "target_bubbles": 1 - stats.target_seconds / seconds,
        "target_rows": stats.target_rows / stats.target_steps,
    }


def _prediction_row(each: dict[str, Any]) -> list[str]:
    return [
        each["pipeline"],
        f"{each['tokens_per_second']:.1f}",
        f"{each['speed_up']:.2f} +-{each['standard_error']:.2f}",
        f"{each['mean_acceptance_length']:.2f}",
        f"{each['overlap_ratio']:.0%}",
        f"{abs(each['target_bubbles']):.0%}",
    ]


def _numbers(text: str) -> tuple[float, ...]:
    """For ``type=``."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between, not {text!r}") from None


def _curve(text: str) -> tuple[float, ...]:
    """For ``type=``: times that grow."""
    times = _numbers(text)
    if not all(0 < each < math.inf for each in times) or list(times) != sorted(times):
        raise argparse.ArgumentTypeError(f"must be positive times that do not decrease, not {text!r}")
    return times


def _positive(text: str) -> float:
    """For ``type=``."""
    value = real(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive, not {text!r}")
    return value


def _not_negative(text: str) -> float:
    """For ``type=``."""
    value = real(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text!r}")
    return value


def _add_pair(parser: Parser) -> None:
    group = parser.add_argument_group("a target and a drafter; times in milliseconds")
    add = group.add_argument
    add("--acceptance", metavar="P[,P...]", type=_numbers,
        help="chance that the target's token is the drafter's first, second, ... guess")  # fmt: skip
    sources = group.add_mutually_exclusive_group()
    sources.add_argument("--target-ms", metavar="MS", type=_positive, help="a target step of one row")
    sources.add_argument("--target-curve", metavar="MS[,MS...]", type=_curve, help="of 1, 2, ... rows")
    sources.add_argument("--target-curve-file", metavar="FILE", help="the same as a JSON list")
    add("--slope", metavar="F", type=_not_negative,
        help=f"with --target-ms: what a row adds, as a share of it; default {SLOPE}")  # fmt: skip
    add(
        "--draft-ms",
        metavar="MS[,MS...]",
        type=_curve,
        help="a draft step, or one that expands 1, 2, ... nodes",
    )
    for name, text in TIMES.items():
        add("--" + name.replace("_", "-"), metavar="MS", type=_not_negative, help=text)
    add("--contrast", metavar="F", type=real, help="how much easy and hard positions differ; default 0")
    add("--correlation", metavar="F", type=real, help="of neighbours' difficulty; default 0")


def _add_speculation(parser: Parser) -> None:
    add = parser.add_argument_group("speculation").add_argument
    add("--pipeline", metavar="P", help="parallel, serial or pearl; all by default")
    add("--width", metavar="N", type=integer, help="nodes that one draft step expands")
    add("--num-speculative-tokens", metavar="K", type=integer, help="most draft tokens per target step")
    add("--depth", metavar="N", type=integer, help="with serial: most draft steps per target step")
    add("--min-score", metavar="F", type=real, help="nodes with a lower path score are not expanded")
