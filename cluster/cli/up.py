"""``outrider up``: starts a cluster that stays."""

import argparse
import json
import subprocess
import sys
from typing import TYPE_CHECKING

from outrider.cluster.cli.arguments import Commands

if TYPE_CHECKING:
    from outrider.cluster.cluster_config import ClusterConfig

NAME = "up"
SUMMARY = "start a cluster that stays until 'outrider down'"

DESCRIPTION = """\
Starts what a cluster.yaml describes and returns when all of it serves.

With address: local, Ray runs on this machine alone and ends with the cluster. Otherwise the
cluster joins the Ray cluster at that address. One that cannot start leaves nothing behind.
"""

EXAMPLES = """\
examples:
  outrider up cluster.yaml
  outrider generate cluster.yaml --prompt 'def fibonacci(n):'
  outrider status cluster.yaml
  outrider down cluster.yaml
"""


def register(commands: Commands) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(NAME, help=SUMMARY, description=DESCRIPTION, epilog=EXAMPLES)
    parser.set_defaults(run=run)
    parser.add_argument("cluster", metavar="cluster.yaml", help="what to start")
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def run(arguments: argparse.Namespace) -> int:
    """Starts the cluster and shows what it consists of."""
    from outrider.cluster.cli.output import notice
    from outrider.cluster.cli.status import show
    from outrider.cluster.cluster_config import load_config

    config = load_config(arguments.cluster)
    with notice("starting the cluster ..."):
        if config.address == "local":
            _start_local(config)
        else:
            _start_detached(config)
    show(config, as_json=False)
    print(f"outrider down {arguments.cluster} ends it", file=sys.stderr)
    return 0


def _start_detached(config: "ClusterConfig") -> None:
    from outrider.cluster.standing import attached, own_controller

    with attached(config), own_controller(config, detached=True):
        pass


def _start_local(config: "ClusterConfig") -> None:
    from outrider.cluster.standing import find_local, log_file
    from outrider.speculation.errors import ClusterError

    if find_local(config.name) is not None:
        raise ClusterError(
            f"a cluster called {config.name!r} is up already; 'outrider down' ends it, "
            "or give this one another name"
        )
    with log_file(config.name).open("w") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "outrider.cluster.keeper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            # It must survive this terminal, and its Ctrl-C.
            start_new_session=True,
        )
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    try:
        keeper.stdin.write(config.model_dump_json())
        keeper.stdin.close()
        line = keeper.stdout.readline()
    except BaseException:
        keeper.terminate()
        keeper.wait()
        raise
    finally:
        keeper.stdout.close()
    said = json.loads(line) if line else {"error": f"it ended; see {log_file(config.name)}"}
    if "error" in said:
        keeper.wait()
        raise ClusterError(said["error"])
