"""``outrider generate``: continues texts, the target in this very process or on a cluster."""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from outrider.cluster.cli.arguments import Commands, Parser, integer, real
from outrider.cluster.cli.models import (
    add_models,
    add_speculation,
    drafting_of,
    load_llm,
    refuse_settings_of_this_process,
    speculative_config,
)
from outrider.cluster.cli.prompts import read_prompts
from outrider.speculation.errors import InvalidConfigError, InvalidRequestError
from outrider.speculation.request import Request, StepOutput
from outrider.speculation.sampling_params import SamplingParams

if TYPE_CHECKING:
    from outrider.actors.tracing import Trace
    from outrider.cluster.cli.output import Output
    from outrider.cluster.generation import TextGenerator
    from outrider.cluster.llm import LLM
    from outrider.cluster.seeing.files import Seeing

Prepared: TypeAlias = list[tuple[str, list[Request]]]
"""Prompts with a request per choice."""
Load: TypeAlias = Callable[["Trace | None"], "TextGenerator"]

NAME = "generate"
SUMMARY = "continue texts with a target model, helped by a draft model"

DESCRIPTION = """\
Continues texts. The tokens are the target's own, whatever drafts for it.

Without --target, the embedded demo pair writes Python. A --target of your own decodes
plainly unless --draft or --speculative-config names something to draft for it.

With a cluster.yaml, the cluster generates: the standing one of that name if 'outrider up' has
started it, else one that is started for this command.
"""

EXAMPLES = """\
examples:
  outrider generate --prompt 'def fibonacci(n):'
  outrider generate --target Qwen/Qwen3-8B --draft Qwen/Qwen3-0.6B --prompt 'Once upon a time'
  outrider generate --prompt-file prompts.txt --n 2 --temperature 0.8 --seed 1 --json > out.jsonl
  outrider generate --workers local --prompt-file prompts.txt
  outrider generate cluster.yaml --prompt 'def fibonacci(n):'
  outrider generate --target ./model -sc '{"method": "ngram"}' < letter.txt

docs/workers.md tells more about --workers, docs/seeing.md about --trace and --record.

On a terminal the text appears as it comes. Elsewhere standard output holds only texts, or
with --json one object per line and result: prompt, index, text, token_ids, finish_reason,
stop_reason, seed and stats, and where they are asked for logprobs and prompt_logprobs, an entry
per token: {"token_id", "logprob", "rank", "top": [[id, logprob], ...]}.
"""


def register(commands: Commands) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(NAME, help=SUMMARY, description=DESCRIPTION, epilog=EXAMPLES)
    parser.set_defaults(run=run)
    parser.add_argument("cluster", metavar="cluster.yaml", nargs="?", help="generate on this cluster")
    _add_prompts(parser)
    add_models(parser, "--target")
    _add_sampling(parser)
    add_speculation(parser)
    _add_seeing(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per result")
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def run(arguments: argparse.Namespace) -> int:
    """Reads the prompts, loads the models and writes every result."""
    # All that can be refused without a model is, before seconds go into loading one.
    load = _cluster(arguments) if arguments.cluster is not None else _in_this_process(arguments)
    _require_json(arguments)
    prompts = read_prompts(arguments.prompt, arguments.prompt_file)
    params = _sampling_params(arguments)
    from outrider.cluster.cli.output import Output, notice

    with ExitStack() as opened:
        seeing = _seeing(arguments, opened)
        with notice("loading the models ..." if arguments.cluster is None else "starting the cluster ..."):
            llm = opened.enter_context(load(None if seeing is None else seeing.log))
        if seeing is not None:
            opened.enter_context(seeing.writing(cast("LLM", llm).model.tokenizer))
        # In this process the pipeline is the engine's own.
        pipeline = arguments.pipeline if arguments.cluster is not None else None
        switches = {"speculative": not arguments.no_speculation, "pipeline": pipeline}
        prepared = _prepare(llm, prompts, params, switches)
        output = Output(total=len(prompts) * params.n, as_json=arguments.json, one_choice=params.n == 1)
        warnings = _Warnings(llm)
        try:
            (_show_each if output.stream else _write_all)(llm, prepared, output, warnings)
        finally:
            output.close()
    return 0


class _Warnings:
    """Says once of each draft worker that is gone that it is, between two results."""

    def __init__(self, llm: "TextGenerator") -> None:
        self._llm = llm
        self._told: set[str] = set()

    def show(self) -> None:
        failures = self._llm.failures()
        for address, line in failures.items():
            if address not in self._told and sys.stderr is not None:
                print(f"outrider: warning: {line}", file=sys.stderr, flush=True)
        # One that came back and is lost again is news.
        self._told = set(failures)


def _show_each(llm: "TextGenerator", prepared: Prepared, output: "Output", warnings: _Warnings) -> None:
    """One after the other, as they come."""
    for number, (prompt, requests) in enumerate(prepared, 1):
        for request in requests:
            output.begin(number, request.choice)
            began = time.perf_counter()
            done = llm.complete(request, lambda step: output.piece(step.text))
            output.end(number, prompt, request.params.seed, done, time.perf_counter() - began)
            warnings.show()


def _write_all(llm: "TextGenerator", prepared: Prepared, output: "Output", warnings: _Warnings) -> None:
    """Several at once, written in order as they are finished."""
    everything = [
        (number, prompt, request)
        for number, (prompt, requests) in enumerate(prepared, 1)
        for request in requests
    ]
    began, choices = time.perf_counter(), 0.0

    def show(request: Request, step: StepOutput) -> None:
        nonlocal choices
        choices += len(step.token_ids) / request.params.max_tokens
        output.progress(choices)

    done = llm.complete_all((request for _, _, request in everything), show)
    for (number, prompt, request), completion in zip(everything, done, strict=True):
        output.begin(number, request.choice)
        output.end(number, prompt, request.params.seed, completion, time.perf_counter() - began)
        warnings.show()


def _cluster(arguments: argparse.Namespace) -> Load:
    """Checks what can be checked before anything starts; how to start it."""
    from outrider.cluster.cluster_config import load_config

    if not Path(arguments.cluster).exists():
        raise InvalidConfigError(f"there is no file {arguments.cluster!r}; a text goes after --prompt")
    refuse_settings_of_this_process(arguments, "generating")
    for flag in ("trace", "record"):
        if getattr(arguments, flag) is not None:
            raise InvalidConfigError(f"--{flag} is for generating in this process; a cluster writes none yet")
    config = load_config(arguments.cluster)

    def start(trace: "Trace | None") -> "TextGenerator":
        assert trace is None, "the flags for it have been refused"
        from outrider.cluster.ray_cluster import Cluster

        return Cluster(config, debug=getattr(arguments, "debug", False))

    return start


def _in_this_process(arguments: argparse.Namespace) -> Load:
    config = speculative_config(arguments)
    return lambda trace: load_llm(arguments, config, trace)


def _seeing(arguments: argparse.Namespace, opened: ExitStack) -> "Seeing | None":
    """What notes the run for ``--trace`` and ``--record``; their files are opened before a model is."""
    if arguments.trace is None and arguments.record is None:
        return None
    from outrider.cluster.seeing.files import Seeing

    seeing = Seeing(arguments.trace, arguments.record, drafting=drafting_of(arguments))
    return opened.enter_context(seeing)


def _prepare(
    llm: "TextGenerator", prompts: list[str], params: SamplingParams, switches: dict[str, Any]
) -> Prepared:
    """All of them before the first is served, so that a bad one does not waste the others' time."""
    prepared = []
    for number, prompt in enumerate(prompts, 1):
        try:
            prepared.append(llm.prepare(prompt, params, **switches))
        except InvalidRequestError as error:
            if len(prompts) == 1:
                raise
            raise InvalidRequestError(f"prompt {number} of {len(prompts)}: {error}") from error
    return prepared


def _sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        n=arguments.n,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
        stop=arguments.stop,
        ignore_eos=arguments.ignore_eos,
        logprobs=arguments.logprobs,
        prompt_logprobs=arguments.prompt_logprobs,
    )


def _require_json(arguments: argparse.Namespace) -> None:
    """Refuses what only a JSON object has a place for."""
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(arguments, name) is not None and not arguments.json:
            raise InvalidConfigError(f"--{name.replace('_', '-')} needs --json, which has a field for them")


def _add_prompts(parser: Parser) -> None:
    group = parser.add_argument_group("prompts (else all of standard input is one)")
    sources = group.add_mutually_exclusive_group()
    sources.add_argument("--prompt", metavar="TEXT", action="append", help="a text; repeat it for several")
    sources.add_argument("--prompt-file", metavar="FILE", help="one prompt a line; blank lines are skipped")


def _add_sampling(parser: Parser) -> None:
    add = parser.add_argument_group("sampling").add_argument
    add("--max-tokens", metavar="N", type=integer, default=128, help="longest output; default 128")
    add("--temperature", metavar="F", type=real, default=0.0, help="default 0: the most probable token")
    add("--top-p", metavar="F", type=real, default=1.0, help="keep this much probability; default 1")
    add("--top-k", metavar="N", type=integer, default=0, help="keep this many tokens; default 0: all")
    add(
        "--min-p",
        metavar="F",
        type=real,
        default=0.0,
        help="least share of the best's probability; default 0",
    )
    add("--seed", metavar="N", type=integer, help="the same seed gives the same tokens; default: a fresh one")
    add("--n", metavar="N", type=integer, default=1, help="choices per prompt; default 1")
    add("--stop", metavar="STR", action="append", default=[], help="ends the output; repeat it for several")
    add("--ignore-eos", action="store_true", help="write on after the end-of-text token")
    add(
        "--logprobs",
        metavar="N",
        type=integer,
        help="with --json: log-probabilities of the tokens and of the N most probable ones, 0 to 20",
    )
    add("--prompt-logprobs", metavar="N", type=integer, help="the same for the prompt's tokens")


def _add_seeing(parser: Parser) -> None:
    add = parser.add_argument_group("seeing where the time goes").add_argument
    add("--trace", metavar="FILE", help="write a trace, for 'outrider trace' and ui.perfetto.dev")
    add("--record", metavar="FILE", help="write every draft tree and verdict, for 'outrider replay'")
