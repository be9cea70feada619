"""``outrider status``: what a standing cluster consists of, and how it fares."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from outrider.cluster.cli.arguments import Commands

if TYPE_CHECKING:
    from outrider.cluster.cluster_config import ClusterConfig

NAME = "status"
SUMMARY = "show what a standing cluster consists of"

DESCRIPTION = """\
Shows the members of a cluster that 'outrider up' started: where they run, whether they serve, how
often they were started, and what keeps those that do not.
"""

EXAMPLES = """\
examples:
  outrider status cluster.yaml
  outrider status cluster.yaml --json
"""


def register(commands: Commands) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(NAME, help=SUMMARY, description=DESCRIPTION, epilog=EXAMPLES)
    parser.set_defaults(run=run)
    parser.add_argument("cluster", metavar="cluster.yaml", help="the file it was started with")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints a table; the exit code is 0 if all members serve."""
    from outrider.cluster.cluster_config import load_config

    return show(load_config(arguments.cluster), as_json=arguments.json)


def show(config: "ClusterConfig", *, as_json: bool) -> int:
    """Finds the standing cluster and prints its members.

    Raises:
        ClusterError: no cluster of that name is up.
    """
    from outrider.cluster.standing import standing_controller

    with standing_controller(config) as controller:
        rows = controller.status()
        figures = {name: controller.target_status(each) for name, each in controller.targets().items()}
    if as_json:
        print(json.dumps({"name": config.name, "members": rows, "targets": figures}))
    else:
        _print_table(config.name, rows, figures)
    return 0 if all(row["phase"] == "ready" for row in rows) else 1


def _print_table(name: str, rows: list[dict[str, Any]], figures: dict[str, dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"cluster {name}", box=box.SIMPLE, title_justify="left")
    for heading in ("member", "state", "starts", "node", "process", "remarks"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        place = row["places"][0] if row["places"] else {"node": "", "pid": ""}
        table.add_row(
            row["name"],
            row["phase"],
            str(row["starts"]),
            place["node"],
            str(place["pid"]),
            row["note"] or _remarks(row, figures.get(row["name"])),
        )
    Console().print(table)


def _remarks(row: dict[str, Any], figures: dict[str, Any] | None) -> str:
    if figures is None:
        return f"drafts at {row['address']}" if row["address"] else ""
    drafters = figures["drafters"]
    return (
        f"{figures['model']}, {figures['running']} running, {figures['waiting']} waiting, "
        f"{drafters} draft worker{'' if drafters == 1 else 's'} in reach"
    )
