"""``outrider bench``: measurements of this machine. Each is a module that registers its own parser here."""

import argparse

from outrider.cluster.cli import bench_kernels, bench_pipeline
from outrider.cluster.cli.arguments import Commands

NAME = "bench"
SUMMARY = "measure this machine"

BENCHMARKS = (bench_kernels, bench_pipeline)

EXAMPLES = """\
examples:
  outrider bench kernels --quick
  outrider bench pipeline --quick

'outrider bench BENCHMARK --help' lists the flags of a benchmark.
"""


def register(commands: Commands) -> None:
    """Adds the command's parser, and below it each benchmark's."""
    parser = commands.add_parser(NAME, help=SUMMARY, description="Measures this machine.", epilog=EXAMPLES)
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    benchmarks = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    for benchmark in BENCHMARKS:
        benchmark.register(benchmarks)
