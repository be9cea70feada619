"""``outrider bench pipeline``: what a draft worker brings on this machine."""

import argparse
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from outrider.cluster.cli.arguments import Commands, integer, real
from outrider.cluster.given_files import writing
from outrider.speculation.errors import InvalidConfigError

if TYPE_CHECKING:
    from outrider.cluster.bench.pipeline import Plan

NAME = "pipeline"
SUMMARY = "speculation with a draft worker against plain decoding, and the simulator's prediction of it"

DESCRIPTION = """\
Decodes held-out prompts plainly on the target's core, plainly on all cores, and with a draft worker
on a core of its own in each pipeline. All ways take turns on every prompt; tokens are compared, and
ratios come with 95 % intervals. Then the simulator is told what was measured on the way, and what it
predicts stands beside the measurement. Nothing else should run meanwhile.

The target is the embedded model, made deeper without changing what it predicts, so that it costs
what a larger one costs. The exit code is 1 if a token differed.
"""

EXAMPLES = """\
examples:
  outrider bench pipeline --quick
  outrider bench pipeline --temperatures 0 1 --delays 0 0.5 0.8 --plot pipelines.svg
  outrider bench pipeline --draft-parameters 12M --json > pipelines.json

docs/benchmarks.md says how to read the figures.
"""

PARAMETERS = "120M"
FULL = {"prompts": 15, "tokens": 128, "delays": [0.0, 0.5, 0.8]}
QUICK = {"prompts": 3, "tokens": 32, "delays": [0.0]}

LEGEND = """\
over plain: times faster than plain decoding on the target's core, with a 95 % interval; straight: texts
that do not loop alone; simulated: by the simulator, without prompts, and measured over it; length: mean
acceptance length; overlap: of drafting with target steps; wait: ms per token; bytes: per token; c: a
target step of one row in draft steps"""


def register(commands: Commands) -> None:
    """Adds the benchmark's parser."""
    parser = commands.add_parser(NAME, help=SUMMARY, description=DESCRIPTION, epilog=EXAMPLES)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--target", metavar="DIR|ID", help="the embedded one by default")
    add("--draft", metavar="DIR|ID", help="the embedded one by default")
    add(
        "--parameters",
        metavar="N",
        help=f"make the target this large; default {PARAMETERS} for the embedded one, others as they are",
    )
    add("--draft-parameters", metavar="N", help="make the draft model this large; by default as it is")
    add("--dtype", default="bfloat16", help="auto (as saved), bfloat16 (the default), float32 or float64")
    add("--prompts", metavar="N", type=integer, help="default 15, with --quick 3; two more warm up")
    add("--tokens", metavar="N", type=integer, help="of every text; default 128, with --quick 32")
    add("--temperatures", metavar="T", type=real, nargs="+", default=[0.0, 1.0], help="default 0 1")
    add(
        "--delays",
        metavar="D",
        type=real,
        nargs="+",
        help="round trips to the worker in target steps, beside the machine's own; "
        "default 0 0.5 0.8, with --quick 0",
    )
    add("--quick", action="store_true", help="few prompts and short texts: rough")
    add("--plot", metavar="FILE", help="write the ratios as an SVG")
    add("--trace", metavar="FILE", help="write a trace of the last steps; noting them takes time, too")
    add("--json", action="store_true", help="print one JSON object only")
    add("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints; 1 if a way of decoding changed a token."""
    for name, value in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    _check(arguments)
    from outrider.cluster.bench.machine import description

    with ExitStack() as opened:
        # Opened at once: after minutes of measuring it would be too late to find out.
        plot = None if arguments.plot is None else opened.enter_context(_opened(arguments.plot))
        settings = _measured(arguments, opened)
        if plot is not None:
            plot.write(_plot(settings, arguments))
    if not arguments.json:
        print(LEGEND + "\n")
    names = ("target", "draft", "parameters", "draft_parameters", "dtype", "prompts", "tokens")
    given = {name: getattr(arguments, name) for name in names}
    print(json.dumps({**description(), **given, "settings": settings}))
    return 0 if all(each["identical"] for each in settings) else 1


def _check(arguments: argparse.Namespace) -> None:
    for name in ("prompts", "tokens"):
        if getattr(arguments, name) < 1:
            raise InvalidConfigError(f"{name} must be at least 1, not {getattr(arguments, name)}")
    for name in ("temperatures", "delays"):
        for value in getattr(arguments, name):
            if not 0 <= value < math.inf:
                raise InvalidConfigError(f"{name} must be at least 0, not {value}")


def _opened(file: str) -> TextIO:
    with writing(f"the plot {file!r}"):
        return open(file, "w", encoding="utf-8")


def _measured(arguments: argparse.Namespace, opened: ExitStack) -> list[dict[str, Any]]:
    """Every setting's report, printed as it comes."""
    from outrider.cluster.bench.pipeline import measure
    from outrider.cluster.bench.ways import rigged
    from outrider.cluster.cli.output import Bar, notice
    from outrider.cluster.seeing.files import Seeing
    from outrider.models.loader import load_model
    from outrider.models.numerics import Numerics

    plan = _plan(arguments)
    target, draft = _models(arguments, opened)
    seeing = None
    if arguments.trace is not None:
        seeing = opened.enter_context(Seeing(arguments.trace, None, drafting="parallel"))
    with notice("starting a target, twice, and a draft worker ..."):
        rig = opened.enter_context(
            rigged(target, draft, arguments.dtype, None if seeing is None else seeing.log)
        )
        model = load_model(str(draft), dtype=arguments.dtype, numerics=Numerics.FAST, max_model_len=None)
    if seeing is not None:
        opened.enter_context(seeing.writing(rig.llm.model.tokenizer))
    settings = []
    bar = Bar("measuring", plan.num_texts)
    opened.callback(bar.close)
    for setting in measure(rig, model, plan, bar.show):
        settings.append(setting)
        if not arguments.json:
            bar.close()
            _print(setting)
    return settings


def _plan(arguments: argparse.Namespace) -> "Plan":
    from outrider.cluster.bench.pipeline import WARM_UP, Plan
    from outrider.models.demo import corpus

    try:
        prompts = corpus.held_out_prompts(arguments.prompts + WARM_UP)
    except ValueError as error:
        raise InvalidConfigError(f"prompts must be fewer, not {arguments.prompts}: {error}") from error
    return Plan(
        prompts=prompts,
        tokens=arguments.tokens,
        temperatures=arguments.temperatures,
        delays=arguments.delays,
    )


def _models(arguments: argparse.Namespace, opened: ExitStack) -> tuple[Path, Path]:
    """Folders of target and draft, as large as they are to be."""
    from outrider.models.demo import pair
    from outrider.models.inflate import inflated, parse_count
    from outrider.models.resolve import resolve_model

    if arguments.target is None and arguments.parameters is None:
        arguments.parameters = PARAMETERS
    asked = (
        (arguments.target, pair.TARGET, arguments.parameters),
        (arguments.draft, pair.DRAFT, arguments.draft_parameters),
    )
    sources = [embedded if name is None else resolve_model(name) for name, embedded, _ in asked]
    sizes = [None if size is None else parse_count(size) for *_, size in asked]
    target, draft = (
        opened.enter_context(inflated(source, size)) for source, size in zip(sources, sizes, strict=True)
    )
    return target, draft


def _print(setting: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("way", no_wrap=True)
    for heading in ("over plain", "straight", "simulated", "length", "overlap", "wait", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, way in setting["ways"].items():
        table.add_row(name.removeprefix("plain, "), *_row(way))
    console.print(_title(setting), soft_wrap=True)
    console.print(table, "")


def _title(setting: dict[str, Any]) -> str:
    same = "all identical" if setting["identical"] else "NOT IDENTICAL"
    ratio = setting["ways"]["parallel"]["c"]
    return (
        f"T = {setting['temperature']:g}, round trip + {setting['round_trip_ms']:.1f} ms"
        f"{f', c = {ratio:.1f}' if ratio else ''}: "
        f"{setting['texts']} texts, {same}, {setting['looping_texts']} loop; "
        f"plain {setting['plain_tokens_per_second']:.1f} tokens/s"
    )


def _row(way: dict[str, Any]) -> Sequence[str]:
    whole, straight = way["over_plain"], way["over_plain_not_looping"]
    first = (
        f"{whole['median']:.2f} ({whole['low']:.2f} to {whole['high']:.2f})",
        "" if straight is None else f"{straight['median']:.2f}",
        f"{way['simulated']:.2f}, {way['measured_over_simulated']:.2f}" if "simulated" in way else "",
    )
    if "overlap" not in way:
        return first
    return (
        *first,
        f"{way['mean_acceptance_length']:.2f}",
        f"{way['overlap']:.0%}",
        f"{way['wait_ms_per_token']:.1f}",
        f"{way['bytes_per_token']:.0f}",
    )


def _plot(settings: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> str:
    from outrider.cluster.bench.bars import Bar, bar_chart

    groups = [
        (
            f"T = {setting['temperature']:g}, + {setting['round_trip_ms']:.1f} ms",
            [
                Bar(value=ratio["median"], low=ratio["low"], high=ratio["high"])
                for ratio in (way["over_plain"] for way in setting["ways"].values())
            ],
        )
        for setting in settings
    ]
    title = f"Times faster than plain decoding, {arguments.tokens} tokens, 95 % intervals"
    return bar_chart(title, list(settings[0]["ways"]), groups)
