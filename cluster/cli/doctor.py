"""``outrider doctor``: finds out why a cluster does not work, or shows that it should."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from outrider.cluster.cli.arguments import Commands
from outrider.speculation.errors import InvalidConfigError

if TYPE_CHECKING:
    from outrider.cluster.doctor import Diagnosis

NAME = "doctor"
SUMMARY = "measure whether the nodes of a cluster fit together"

DESCRIPTION = """\
Looks at every node of the Ray cluster that a cluster.yaml names (without one: at this machine):
versions, devices, ports, models, clocks, the time of a gRPC call from node to node, and a
collective sum over all of them.
"""

EXAMPLES = """\
examples:
  outrider doctor
  outrider doctor cluster.yaml
  outrider doctor cluster.yaml --bundle report.json
"""

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def register(commands: Commands) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(NAME, help=SUMMARY, description=DESCRIPTION, epilog=EXAMPLES)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("cluster", metavar="cluster.yaml", nargs="?", help="the cluster; this machine by default")
    add("--bundle", metavar="FILE", help="also write everything to a file, for a bug report; no secrets")
    add("--json", action="store_true", help="print one JSON object")
    add("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")


def run(arguments: argparse.Namespace) -> int:
    """Prints the findings; the exit code is 0 if there is no problem."""
    from outrider.cluster.cli.output import notice
    from outrider.cluster.cluster_config import load_config, parse_config
    from outrider.cluster.doctor import examine

    if arguments.cluster is None:
        config = parse_config({"draft": {}}, "the default cluster")
    else:
        config = load_config(arguments.cluster)
    if arguments.bundle is not None and not Path(arguments.bundle).absolute().parent.is_dir():
        raise InvalidConfigError(f"--bundle: there is no folder for {arguments.bundle!r}")
    with notice("looking at the nodes ..."):
        diagnosis = examine(config)
    everything = {**diagnosis.as_dict(), "config": _without_secrets(config.model_dump())}
    if arguments.bundle is not None:
        Path(arguments.bundle).write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps(everything))
    else:
        _print(diagnosis)
    return 0 if diagnosis.healthy else 1


def _without_secrets(config: dict[str, object]) -> dict[str, object]:
    """Only the paths of tokens and keys stand in a configuration, but not even these concern others."""
    return {**config, "security": "(left out)"}


def _print(diagnosis: "Diagnosis") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for each in diagnosis.findings:
        table.add_row(Text(each.verdict, _STYLES[each.verdict]), each.what, Text(each.detail))
    console = Console(highlight=False)
    console.print(table)
    verdict = "healthy" if diagnosis.healthy else "not healthy: see the problems above"
    console.print(verdict, style=_STYLES["ok" if diagnosis.healthy else "problem"])
