"""Flags of the commands that load models into this process, and what is loaded for them."""

import argparse
from typing import TYPE_CHECKING, Any

from outrider.cluster.cli.arguments import Parser, integer, json_object, real
from outrider.speculation.errors import InvalidConfigError

if TYPE_CHECKING:
    from outrider.actors.tracing import Trace
    from outrider.cluster.llm import LLM

_OF_THIS_PROCESS = {
    "target": None,
    "draft": None,
    "device": "auto",
    "dtype": "auto",
    "numerics": None,
    "max_model_len": None,
    "max_num_seqs": 8,
    "max_num_batched_tokens": None,
    "kv_cache_memory": None,
    "gpu_memory_utilization": None,
    "target_profile": None,
    "quantization": None,
    "threads": None,
    "tensor_parallel_size": 1,
    "workers": None,
    "num_speculative_tokens": None,
    "speculative_config": None,
}
"""Flags that a cluster.yaml stands in for, and their defaults."""


def refuse_settings_of_this_process(arguments: argparse.Namespace, doing: str) -> None:
    """
    Raises:
        InvalidConfigError: a flag was given that a cluster.yaml stands in for.
    """
    for name, default in _OF_THIS_PROCESS.items():
        if getattr(arguments, name) != default:
            flag = "--" + name.replace("_", "-")
            raise InvalidConfigError(f"{flag} is for {doing} in this process; {arguments.cluster} decides it")


def drafting_of(arguments: argparse.Namespace) -> str:
    """Who drafts in this process's run, as recordings say it: none, local, or a pipeline's name."""
    from outrider.cluster.speculative_config import SpeculativeConfig

    config = speculative_config(arguments)
    if arguments.no_speculation or (config is None and arguments.target is not None):
        return "none"
    parsed = SpeculativeConfig.parse(config or {})
    return "local" if parsed.workers is None else parsed.pipeline


def load_llm(
    arguments: argparse.Namespace, config: dict[str, Any] | None, trace: "Trace | None" = None
) -> "LLM":
    """Loads what the flags ask for; trace: see ``LLM``."""
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
        device=arguments.device,
        dtype=arguments.dtype,
        numerics=arguments.numerics,
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        kv_cache_memory=arguments.kv_cache_memory,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        target_profile=arguments.target_profile,
        quantization=arguments.quantization,
        tensor_parallel_size=arguments.tensor_parallel_size,
        trace=trace,
    )


def own_name(arguments: argparse.Namespace) -> str:
    """What clients ask for where nothing else is said: the name that the target was given here."""
    if arguments.cluster is not None:
        from outrider.cluster.cluster_config import load_config

        return load_config(arguments.cluster).served_name
    return "outrider-demo" if arguments.target is None else str(arguments.target)


def speculative_config(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """``--speculative-config``, with what the simple flags say in place of its own values.

    Raises:
        InvalidConfigError: the flags contradict each other, or nothing could draft.
    """
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


def add_models(parser: Parser, *names: str) -> None:
    """Flags for the models; names: of the one for the target."""
    add = parser.add_argument_group("models").add_argument
    add(*names, dest="target", metavar="DIR|ID", help="folder or hub id; the embedded demo model by default")
    add("--draft", metavar="DIR|ID", help="draft model; none for a --target of your own by default")
    add("--device", default="auto", help="cpu, cuda, or auto (the default): cuda where there is one")
    add("--dtype", default="auto", help="auto (as saved, the default), bfloat16, float32 or float64")
    add(
        "--numerics",
        help="canonical (the default on CPU: the same bits with and without speculation) or fast",
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
        help="rows of one forward; fewer make long prompts hold up the others for less; "
        "default 64, with --numerics fast on cuda 512",
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
        help="share of memory for weights and KV; default 0.9, of the machine's on CPU 0.5",
    )
    add(
        "--target-profile",
        metavar="FILE",
        help="step times of the target, written if missing; else measured at each start",
    )
    add(
        "--quantization",
        metavar="Q",
        help="refused: the target's numbers must be its own; the draft's is a key of --speculative-config",
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


def add_speculation(parser: Parser) -> None:
    """Flags for what drafts."""
    add = parser.add_argument_group("speculation").add_argument
    add("--no-speculation", action="store_true", help="decode plainly; the tokens are the same")
    add("--num-speculative-tokens", metavar="K", type=integer, help="most draft tokens per target step")
    add(
        "--workers",
        metavar="W",
        help="draft in other processes: local or local:N starts them here, host:port[,...] finds them there",
    )
    add("--pipeline", metavar="P", help="with draft workers: parallel (the default), serial or pearl")
    add(
        "-sc",
        "--speculative-config",
        metavar="JSON",
        type=json_object,
        help="all settings, in vLLM's keys; without a model it looks n-grams up. "
        "--draft, --num-speculative-tokens, --workers and --pipeline replace its values",
    )
