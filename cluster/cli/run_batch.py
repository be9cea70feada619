"""``outrider run-batch``: answers the lines of a file, the target in this very process or on a cluster."""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from outrider.cluster.cli.arguments import Commands, Parser, integer
from outrider.cluster.cli.models import (
    add_models,
    add_speculation,
    load_llm,
    own_name,
    refuse_settings_of_this_process,
    speculative_config,
)
from outrider.cluster.given_files import read_text, writing
from outrider.speculation.errors import InvalidConfigError, OutriderError

if TYPE_CHECKING:
    from outrider.cluster.api.service import ModelSettings
    from outrider.cluster.batch_files.job import JobOptions
    from outrider.cluster.batch_files.lines import InputFile
    from outrider.cluster.batch_files.report import Report
    from outrider.cluster.batch_files.results import ResultFile, Settings
    from outrider.cluster.cluster_config import ClusterConfig
    from outrider.cluster.generation import TextGenerator

NAME = "run-batch"
SUMMARY = "answer a file of requests in OpenAI's batch format"

DESCRIPTION = """\
Answers every line {custom_id, method, url, body} of a file for /v1/completions or /v1/chat/completions, as
OpenAI's and vLLM's batch files have them. Each answer is written when it is known. A row that cannot be
served is answered with an error, and the job goes on.

However it ends, the same command goes on where it stood: every row is answered once, with the tokens of a
job that was never interrupted. FILE.state beside the output says what job it is.

Without a cluster.yaml the target is in this very process; --model is the embedded demo pair by default.
With one, the cluster generates: the standing one of that name, else one started for this command.
"""

EXAMPLES = """\
examples:
  outrider run-batch -i questions.jsonl -o answers.jsonl
  outrider run-batch -i in.jsonl -o out.jsonl --model Qwen/Qwen3-8B --draft Qwen/Qwen3-0.6B --max-num-seqs 32
  outrider run-batch -i in.jsonl -o out.jsonl --workers local:2 --keep-order --report report.json
  outrider run-batch cluster.yaml -i in.jsonl -o out.jsonl --max-errors 100

docs/batch.md has the format and what is guaranteed.
"""
INTERRUPTED = 130
LARGEST_SEED = 2**64 - 1


def register(commands: Commands) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(NAME, help=SUMMARY, description=DESCRIPTION, epilog=EXAMPLES)
    parser.set_defaults(run=run)
    parser.add_argument("cluster", metavar="cluster.yaml", nargs="?", help="generate on this cluster")
    _add_files(parser)
    add_models(parser, "--model", "--target")
    add_speculation(parser)
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def run(arguments: argparse.Namespace) -> int:
    """Answers every line that has no answer yet."""
    from outrider.cluster.batch_files.identity import what_is_asked
    from outrider.cluster.batch_files.lines import InputFile
    from outrider.cluster.batch_files.results import ResultFile
    from outrider.cluster.cli.output import notice

    # All that can be refused without a model is, before seconds go into loading one.
    options, config, load = _options(arguments), *_generator(arguments)
    settings = _settings(arguments, config)
    _refuse_same_files(arguments)
    _require_writable(arguments.report)
    with ExitStack() as opened:
        source = InputFile(Path(arguments.input))
        opened.callback(source.close)
        results = ResultFile(Path(arguments.output), overwrite=arguments.overwrite)
        opened.callback(results.close)
        what = what_is_asked(source, settings, options)
        results.require(what)
        with notice("loading the models ..." if config is None else "starting the cluster ..."):
            llm = opened.enter_context(load())
        return _answer_all(arguments, llm, settings, options, source, results, what)


def _answer_all(
    arguments: argparse.Namespace,
    llm: "TextGenerator",
    settings: "ModelSettings",
    options: "JobOptions",
    source: "InputFile",
    results: "ResultFile",
    what: "Settings",
) -> int:
    from outrider.cluster.api.service import OfferedModel
    from outrider.cluster.batch_files.identity import who_answers
    from outrider.cluster.batch_files.job import BatchJob
    from outrider.cluster.cli.output import Bar

    card = llm.describe()
    earlier = results.begin({**what, **who_answers(card)})
    bar = Bar("answering", source.size, timed=True)

    def show(report: "Report") -> None:
        note = f"{report.rows} rows, {report.failed} failed, {report.tokens_per_second:.0f} tokens/s"
        bar.show(source.read, note)

    job = BatchJob(llm, OfferedModel(card, settings), source, results, earlier, options, show)
    try:
        job.run()
    except KeyboardInterrupt:
        bar.close()
        _say(f"interrupted; {job.report.line}", "the same command goes on from here")
        return INTERRUPTED
    except OutriderError:
        bar.close()
        _say(job.report.line, "the same command goes on from here")
        raise
    finally:
        bar.close()
        _write_report(arguments.report, job.report)
    _say(job.report.line)
    return 0


def _options(arguments: argparse.Namespace) -> "JobOptions":
    from outrider.cluster.batch_files.job import JobOptions

    if not 0 <= arguments.seed <= LARGEST_SEED:
        raise InvalidConfigError(f"seed must be within [0, 2**64), not {arguments.seed}")
    if arguments.max_errors is not None and arguments.max_errors < 0:
        raise InvalidConfigError(f"max_errors must be at least 0, not {arguments.max_errors}")
    return JobOptions(
        seed=arguments.seed,
        speculative=not arguments.no_speculation,
        keep_order=arguments.keep_order,
        max_errors=arguments.max_errors,
    )


def _generator(
    arguments: argparse.Namespace,
) -> "tuple[ClusterConfig | None, Callable[[], TextGenerator]]":
    """The cluster's configuration, if it is one, and how to start what generates."""
    if arguments.cluster is None:
        config = speculative_config(arguments)
        return None, lambda: load_llm(arguments, config)
    from outrider.cluster.cluster_config import load_config

    if not Path(arguments.cluster).exists():
        raise InvalidConfigError(f"there is no file {arguments.cluster!r}; the input goes after -i")
    refuse_settings_of_this_process(arguments, "generating")
    if arguments.pipeline is not None:
        raise InvalidConfigError(
            f"--pipeline is for generating in this process; {arguments.cluster} decides it"
        )
    cluster = load_config(arguments.cluster)

    def start() -> "TextGenerator":
        from outrider.cluster.ray_cluster import Cluster

        return Cluster(cluster, debug=getattr(arguments, "debug", False))

    return cluster, start


def _settings(arguments: argparse.Namespace, config: "ClusterConfig | None") -> "ModelSettings":
    from outrider.cluster.api.calls import Limits
    from outrider.cluster.api.service import ModelSettings

    limits = Limits()
    if config is not None:
        most = config.limits.max_choices
        limits = Limits(
            max_tokens=config.limits.max_tokens, max_choices=limits.max_choices if most is None else most
        )
    template = arguments.chat_template
    return ModelSettings(
        names=tuple(arguments.served_model_name or [own_name(arguments)]),
        chat_template=None if template is None else read_text(template, "chat template"),
        limits=limits,
    )


def _refuse_same_files(arguments: argparse.Namespace) -> None:
    given, taken = Path(arguments.input), Path(arguments.output)
    if given.exists() and taken.exists() and given.samefile(taken):
        raise InvalidConfigError(f"output must be another file than the input, not {arguments.output!r}")


def _require_writable(report: str | None) -> None:
    if report is not None:
        with writing(f"report {report!r}"), Path(report).open("a", encoding="utf-8"):
            pass


def _write_report(path: str | None, report: "Report") -> None:
    if path is not None:
        Path(path).write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")


def _say(*lines: str) -> None:
    if sys.stderr is not None:
        for line in lines:
            print(f"outrider: {line}", file=sys.stderr, flush=True)


def _add_files(parser: Parser) -> None:
    add = parser.add_argument_group("files").add_argument
    add("-i", "--input", metavar="FILE", required=True, help="a request per line")
    add("-o", "--output", metavar="FILE", required=True, help="an answer per line; resumed if it exists")
    add("--overwrite", action="store_true", help="begin anew, whatever the output holds")
    add("--keep-order", action="store_true", help="answer in the input's order; those that are early wait")
    add("--max-errors", metavar="N", type=integer, help="end once more rows have failed; default: never")
    add("--report", metavar="FILE", help="write the closing figures there, as JSON")
    add(
        "--seed",
        metavar="N",
        type=integer,
        default=0,
        help="with its custom_id, seeds a row that brings no seed; default 0",
    )
    add(
        "--served-model-name",
        metavar="NAME",
        nargs="+",
        help="what rows may call the model; by default what it is called here",
    )
    add(
        "--chat-template", metavar="FILE", help="Jinja template of conversations, in place of the model's own"
    )
