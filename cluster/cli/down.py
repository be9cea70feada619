"""``outrider down``: ends a cluster that ``outrider up`` started."""

import argparse
import sys

from outrider.cluster.cli.arguments import Commands

NAME = "down"
SUMMARY = "end a cluster that 'outrider up' started"

DESCRIPTION = """\
Ends a standing cluster: its processes, their places and, with address: local, its Ray.
"""

EXAMPLES = """\
example:
  outrider down cluster.yaml
"""

STOP_SECONDS = 20.0


def register(commands: Commands) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(NAME, help=SUMMARY, description=DESCRIPTION, epilog=EXAMPLES)
    parser.set_defaults(run=run)
    parser.add_argument("cluster", metavar="cluster.yaml", help="the file it was started with")
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def run(arguments: argparse.Namespace) -> int:
    """Ends it, and says so."""
    from outrider.cluster.cli.output import notice
    from outrider.cluster.cluster_config import load_config
    from outrider.cluster.standing import end_local, find_local, standing_controller

    config = load_config(arguments.cluster)
    standing = find_local(config.name) if config.address == "local" else None
    with notice("ending the cluster ..."):
        if standing is not None:
            end_local(standing, STOP_SECONDS)
        else:
            with standing_controller(config) as controller:
                controller.shut_down()
    print(f"cluster {config.name!r} is down", file=sys.stderr)
    return 0
