"""``outrider check``: validates a cluster.yaml and says what would run where."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from outrider.cluster.cli.arguments import Commands

if TYPE_CHECKING:
    from outrider.cluster.checks import CheckReport
    from outrider.cluster.probe import ModelReport

NAME = "check"
UNFOLDED = 250
"""Columns of a table that a program reads."""
SUMMARY = "validate a cluster.yaml and say what would run where"

DESCRIPTION = """\
Reads a cluster.yaml, looks for its models on every node that could use them, and says which
process would be placed where and what does not fit. Starts nothing of the cluster.
"""

EXAMPLES = """\
examples:
  outrider check cluster.yaml
  outrider check cluster.yaml --json
"""


def register(commands: Commands) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(NAME, help=SUMMARY, description=DESCRIPTION, epilog=EXAMPLES)
    parser.set_defaults(run=run)
    parser.add_argument("cluster", metavar="cluster.yaml", help="what to check")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan; the exit code is 0 if everything fits."""
    from outrider.cluster.checks import check
    from outrider.cluster.cli.output import notice
    from outrider.cluster.cluster_config import load_config

    config = load_config(arguments.cluster)
    with notice("looking at the nodes ..."):
        report = check(config)
    if arguments.json:
        print(json.dumps(asdict(report)))
    else:
        _print(report)
    return 1 if report.problems else 0


def _print(report: "CheckReport") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # Where nobody looks on, paths stay whole.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else UNFOLDED)
    placed = Table(box=box.SIMPLE)
    for heading in ("node", "offers", "would run", "models"):
        placed.add_column(heading, overflow="fold")
    for node in report.nodes:
        members = [name for name, place in report.plan.places.items() if place == node.name]
        offers = [f"{amount:g} {name}" for name, amount in node.resources.items() if name in ("CPU", "GPU")]
        models = [f"{each.model}\n  {_in_short(each)}" for each in report.models[node.name]]
        placed.add_row(node.name, ", ".join(offers), ", ".join(members) or "nothing", "\n".join(models))
    console.print(placed)
    for problem in report.problems:
        console.print(f"problem: {problem}", style="bold red", markup=False)
    if not report.problems:
        console.print("everything fits", style="bold green")


def _in_short(model: "ModelReport") -> str:
    return "cannot be used" if model.problem else f"{model.parameters / 1e6:.0f}M {model.model_type}"
