"""``outrider generate``: continues texts, the target in this very process or on a cluster."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from outrider.cluster.cli.arguments import Commands, Parser, integer, json_object, real
from outrider.cluster.cli.prompts import read_prompts
from outrider.speculation.errors import InvalidConfigError, InvalidRequestError
from outrider.speculation.request import Request, StepOutput
from outrider.speculation.sampling_params import SamplingParams

if TYPE_CHECKING:
    from outrider.cluster.cli.output import Output
    from outrider.cluster.generation import TextGenerator
    from outrider.cluster.llm import LLM

Prepared: TypeAlias = list[tuple[str, list[Request]]]
"""Prompts with a request per choice."""

_OF_THIS_PROCESS = {
    "target": None,
    "draft": None,
    "dtype": "auto",
    "numerics": "canonical",
    "max_model_len": None,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "kv_cache_memory": None,
    "gpu_memory_utilization": None,
    "target_profile": None,
    "threads": None,
    "tensor_parallel_size": 1,
    "workers": None,
    "num_speculative_tokens": None,
    "speculative_config": None,
}
"""Flags that a cluster.yaml stands in for, and their defaults."""
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

docs/workers.md tells more about --workers.

On a terminal the text appears as it comes. Elsewhere standard output holds only texts, or
with --json one object per line and result: prompt, index, text, token_ids, finish_reason,
stop_reason, seed and stats.
"""


def register(commands: Commands) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(NAME, help=SUMMARY, description=DESCRIPTION, epilog=EXAMPLES)
    parser.set_defaults(run=run)
    parser.add_argument("cluster", metavar="cluster.yaml", nargs="?", help="generate on this cluster")
    _add_prompts(parser)
    _add_models(parser)
    _add_sampling(parser)
    _add_speculation(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per result")
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def run(arguments: argparse.Namespace) -> int:
    """Reads the prompts, loads the models and writes every result."""
    # All that can be refused without a model is, before seconds go into loading one.
    load = _cluster(arguments) if arguments.cluster is not None else _in_this_process(arguments)
    prompts = read_prompts(arguments.prompt, arguments.prompt_file)
    params = _sampling_params(arguments)
    from outrider.cluster.cli.output import Output, notice

    with notice("loading the models ..." if arguments.cluster is None else "starting the cluster ..."):
        llm = load()
    with llm:
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
    """Says once of each draft worker that it is gone, between two results."""

    def __init__(self, llm: "TextGenerator") -> None:
        self._llm = llm
        self._told: set[str] = set()

    def show(self) -> None:
        failures = self._llm.failures()
        for address, line in failures.items():
            if address not in self._told and sys.stderr is not None:
                print(f"outrider: warning: {line}", file=sys.stderr, flush=True)
        self._told.update(failures)


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


def _cluster(arguments: argparse.Namespace) -> Callable[[], "TextGenerator"]:
    """Checks what can be checked before anything starts; how to start it."""
    from outrider.cluster.cluster_config import load_config

    if not Path(arguments.cluster).exists():
        raise InvalidConfigError(f"there is no file {arguments.cluster!r}; a text goes after --prompt")
    for name, default in _OF_THIS_PROCESS.items():
        if getattr(arguments, name) != default:
            flag = "--" + name.replace("_", "-")
            raise InvalidConfigError(
                f"{flag} is for generating in this process; {arguments.cluster} decides it"
            )
    config = load_config(arguments.cluster)

    def start() -> "TextGenerator":
        from outrider.cluster.ray_cluster import Cluster

        return Cluster(config, debug=getattr(arguments, "debug", False))

    return start


def _in_this_process(arguments: argparse.Namespace) -> Callable[[], "TextGenerator"]:
    config = _speculative_config(arguments)
    return lambda: _load(arguments, config)


def _load(arguments: argparse.Namespace, config: dict[str, Any] | None) -> "LLM":
    import torch

    from outrider.cluster.llm import LLM
    from outrider.cluster.workers_config import WorkersConfig

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise InvalidConfigError(f"threads must be at least 1, not {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    elif config is not None and config.get("workers") is not None:
        # Threads that wait for a core that a worker has would slow both down.
        local = WorkersConfig.parse(config["workers"])
        taken = local.count * local.threads if local.is_local else 0
        torch.set_num_threads(max(1, torch.get_num_threads() - taken))
    return LLM(
        arguments.target,
        # A draft model that will not be asked need not be loaded.
        speculative_config=None if arguments.no_speculation else config,
        dtype=arguments.dtype,
        numerics=arguments.numerics,
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        kv_cache_memory=arguments.kv_cache_memory,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        target_profile=arguments.target_profile,
        tensor_parallel_size=arguments.tensor_parallel_size,
    )


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
    )


def _speculative_config(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """``--speculative-config``, with what the simple flags say in place of its own values."""
    given: dict[str, Any] | None = arguments.speculative_config
    flags = {
        "model": arguments.draft,
        "num_speculative_tokens": arguments.num_speculative_tokens,
        "workers": arguments.workers,
        "pipeline": arguments.pipeline,
    }
    simple = {key: value for key, value in flags.items() if value is not None}
    if given is None and not simple:
        return None
    from outrider.cluster.speculative_config import SpeculativeConfig
    from outrider.cluster.workers_config import WorkersConfig
    from outrider.models.demo import pair

    elsewhere = arguments.workers is not None and not WorkersConfig.parse(arguments.workers).is_local
    if given is None and arguments.draft is None and not elsewhere:
        if arguments.target is not None:
            flag = "--" + next(iter(simple)).replace("_", "-")
            raise InvalidConfigError(
                f"{flag} needs something that drafts: give --draft or --speculative-config beside --target"
            )
        given = {"model": str(pair.DRAFT)}
    config = {**(given or {}), **simple}
    SpeculativeConfig.parse(config)
    return config


def _add_prompts(parser: Parser) -> None:
    group = parser.add_argument_group("prompts (else all of standard input is one)")
    sources = group.add_mutually_exclusive_group()
    sources.add_argument("--prompt", metavar="TEXT", action="append", help="a text; repeat it for several")
    sources.add_argument("--prompt-file", metavar="FILE", help="one prompt a line; blank lines are skipped")


def _add_models(parser: Parser) -> None:
    add = parser.add_argument_group("models").add_argument
    add("--target", metavar="DIR|ID", help="folder or hub id; the embedded demo model by default")
    add("--draft", metavar="DIR|ID", help="draft model; none for a --target of your own by default")
    add("--dtype", default="auto", help="auto (as saved, the default), bfloat16, float32 or float64")
    add(
        "--numerics",
        default="canonical",
        help="canonical (the default: the same bits with and without speculation) or fast",
    )
    add(
        "--max-model-len",
        metavar="N",
        type=integer,
        help="tokens of prompt and output; the model's by default",
    )
    add("--max-num-seqs", metavar="N", type=integer, default=8, help="prompts served at once; default 8")
    add(
        "--max-num-batched-tokens",
        metavar="N",
        type=integer,
        default=64,
        help="rows of one forward; fewer make long prompts hold up the others for less; default 64",
    )
    add(
        "--kv-cache-memory",
        metavar="SIZE",
        help="bytes of the KV cache, or e.g. 2GiB; by default what max-num-seqs full texts can use",
    )
    add(
        "--gpu-memory-utilization",
        metavar="F",
        type=real,
        help="share of memory for weights and KV, of the machine's on CPU; default 0.5",
    )
    add(
        "--target-profile",
        metavar="FILE",
        help="step times of the target, written if missing; else measured at each start",
    )
    add("--threads", metavar="N", type=integer, help="CPU threads; by default all but local workers'")
    add(
        "-tp",
        "--tensor-parallel-size",
        metavar="N",
        type=integer,
        default=1,
        help="processes that share the target and its threads; default 1",
    )


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


def _add_speculation(parser: Parser) -> None:
    add = parser.add_argument_group("speculation").add_argument
    add("--no-speculation", action="store_true", help="decode plainly; the tokens are the same")
    add("--num-speculative-tokens", metavar="K", type=integer, help="most draft tokens per target step")
    add(
        "--workers",
        metavar="W",
        help="draft in other processes: local or local:N starts them here, host:port[,...] finds them there",
    )
    add("--pipeline", metavar="P", help="with draft workers: parallel (the default) or serial")
    add(
        "-sc",
        "--speculative-config",
        metavar="JSON",
        type=json_object,
        help="all settings, in vLLM's keys; without a model it looks n-grams up. "
        "--draft, --num-speculative-tokens, --workers and --pipeline replace its values",
    )
