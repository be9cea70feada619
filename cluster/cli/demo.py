"""``outrider demo``: a small cluster on this machine, shown at work and measured."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from outrider.cluster.cli.arguments import Commands, integer
from outrider.speculation.errors import InvalidConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from outrider.cluster.demo import Measurement
    from outrider.cluster.generation import TextGenerator

NAME = "demo"
SUMMARY = "start a small cluster on this machine, show it at work, measure it and end it"

DESCRIPTION = """\
Starts Ray with one target and one draft worker, each in a process of its own, continues three
prompts before your eyes, compares plain decoding with both ways of speculating, and ends it all.

The target is the embedded model of 11M parameters, made deeper without changing what it
predicts, so that it costs what a larger one costs.
"""

EXAMPLES = """\
examples:
  outrider demo
  outrider demo --parameters 120M --tokens 128
"""


def register(commands: Commands) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(NAME, help=SUMMARY, description=DESCRIPTION, epilog=EXAMPLES)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--parameters", metavar="N", default="60M", help="of the target; default 60M")
    add("--tokens", metavar="N", type=integer, default=48, help="of every text; default 48")
    add("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")


def run(arguments: argparse.Namespace) -> int:
    """Shows and measures; 1 if speculation changed a token."""
    if arguments.tokens < 1:
        raise InvalidConfigError(f"tokens must be at least 1, not {arguments.tokens}")
    from rich.console import Console

    console = Console(highlight=False)
    with _cluster(arguments.parameters, debug=getattr(arguments, "debug", False)) as cluster:
        _show_texts(console, cluster, arguments.tokens)
        rows = _measure(cluster, arguments.tokens)
    return _show_table(console, rows, arguments)


@contextmanager
def _cluster(parameters: str, *, debug: bool) -> Iterator["TextGenerator"]:
    from outrider.cluster.cli.output import notice
    from outrider.cluster.cluster_config import parse_config
    from outrider.cluster.ray_cluster import Cluster
    from outrider.models.demo import pair
    from outrider.models.inflate import inflate, parse_count

    with tempfile.TemporaryDirectory(prefix="outrider-demo-") as folder:
        target = Path(folder) / "target"
        with notice("making the target ..."):
            inflate(pair.TARGET, target, parameters=parse_count(parameters))
        values = {
            "name": f"demo-{Path(folder).name.removeprefix('outrider-demo-').lower().replace('_', '-')}",
            # Every way must take in its prompts by itself.
            "target": {"model": str(target), "max_num_seqs": 1, "enable_prefix_caching": False},
            "draft": {"model": str(pair.DRAFT)},
        }
        with notice("starting Ray, a target and a draft worker (ten to twenty seconds) ..."):
            cluster = Cluster(parse_config(values, "demo"), debug=debug)
        with cluster:
            yield cluster


def _show_texts(console: "Console", cluster: "TextGenerator", tokens: int) -> None:
    """The prompts' continuations as they come, drafted tokens apart from the target's own."""
    from rich.text import Text

    from outrider.cluster.demo import PROMPTS, params_of
    from outrider.models.demo import pair
    from outrider.models.tokenizer import IncrementalDetokenizer, Tokenizer
    from outrider.speculation.request import Completion

    tokenizer = Tokenizer.load(pair.TARGET)
    drafted, own = "bold green", "black on yellow"
    legend = Text.assemble(
        ("prompt", "dim"),
        "  ",
        ("drafted, and accepted by the target", drafted),
        "  ",
        ("the target's own", own),
    )
    console.print(legend, end="\n\n")
    for prompt in PROMPTS:
        _, (request,) = cluster.prepare(prompt, params_of(0.0, tokens))
        detokenizer = IncrementalDetokenizer(tokenizer)
        console.print(Text(prompt, "dim"), end="")
        for step in cluster.steps(request):
            if isinstance(step, Completion):
                console.print(Text(detokenizer.flush(), own), end="\n")
                console.print(Text(_share(step), "dim"), end="\n\n")
                continue
            accepted = step.token_ids[: step.num_accepted]
            console.print(Text(detokenizer.push(accepted), drafted), end="")
            console.print(Text(detokenizer.push(step.token_ids[step.num_accepted :]), own), end="")


def _share(done: "object") -> str:
    from outrider.speculation.request import Completion

    assert isinstance(done, Completion)
    accepted, steps = done.stats.num_accepted_tokens, done.stats.target_steps
    return f"{len(done.token_ids)} tokens in {steps} steps of the target; {accepted} were drafted"


def _measure(cluster: "TextGenerator", tokens: int) -> list["Measurement"]:
    from outrider.cluster.cli.output import Bar
    from outrider.cluster.demo import MODES, PROMPTS, TEMPERATURES, measure

    rows: list[Measurement] = []
    bar = Bar("measuring", len(MODES) * len(PROMPTS) * len(TEMPERATURES))
    try:
        for done, row in enumerate(measure(cluster, tokens), 1):
            if row not in rows:
                rows.append(row)
            bar.show(done)
    finally:
        bar.close()
    return rows


def _show_table(console: "Console", rows: list["Measurement"], arguments: argparse.Namespace) -> int:
    from rich import box
    from rich.table import Table

    from outrider.cluster.demo import PROMPTS, same_tokens

    table = Table(
        title=f"target of {arguments.parameters} parameters, {len(PROMPTS)} texts of {arguments.tokens}",
        box=box.SIMPLE,
        title_justify="left",
        title_style="bold",
    )
    table.add_column("temperature", no_wrap=True)
    table.add_column("decoding", no_wrap=True)
    for heading in ("tokens/s", "over plain", "tokens a step", "drafting hidden", "same tokens"):
        table.add_column(heading, justify="right")
    identical = True
    plain = rows[0]
    for row in rows:
        if row.mode.pipeline is None:
            plain = row
        same = same_tokens(plain, row)
        identical &= same
        length, overlap = row.mean_acceptance_length, row.overlap
        table.add_row(
            f"{row.temperature:g}" if row is plain else "",
            row.mode.name,
            f"{row.tokens_per_second:.1f}",
            f"{row.tokens_per_second / plain.tokens_per_second:.2f}",
            "1" if length is None else f"{length:.2f}",
            "" if overlap is None else f"{overlap:.0%}",
            "yes" if same else "NO",
            end_section=row is not plain and row.mode.pipeline == "parallel",
        )
    console.print(table)
    if not identical:
        print("outrider: error: speculation changed tokens: please report this", file=sys.stderr)
    return 0 if identical else 1
