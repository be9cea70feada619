"""``outrider serve``: an OpenAI-compatible server, for a target in this process or a cluster's."""

import argparse
import sys
from collections.abc import Awaitable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from outrider.cluster.api_keys import api_keys
from outrider.cluster.cli.arguments import Commands, Parser, integer, real
from outrider.cluster.cli.models import (
    add_models,
    add_speculation,
    drafting_of,
    load_llm,
    own_name,
    refuse_settings_of_this_process,
    speculative_config,
)
from outrider.cluster.given_files import read_text
from outrider.speculation.errors import InvalidConfigError

if TYPE_CHECKING:
    from outrider.cluster.api.service import ModelSettings

NAME = "serve"
SUMMARY = "serve a target over HTTP, as OpenAI's API"

DESCRIPTION = """\
Serves /v1/completions, /v1/chat/completions, /v1/models, /tokenize, /detokenize, /metrics, /health and a
page at /. Ctrl-C lets requests in flight end.

Without a cluster.yaml the target is in this very process; --model is the embedded demo pair by default.
With one, its targets and draft workers serve, behind Ray Serve.

It listens on the loopback interface unless --host says otherwise; others need no key unless --api-key or
--api-key-file, or the variable OUTRIDER_API_KEY, gives one.
"""

EXAMPLES = """\
examples:
  outrider serve
  outrider serve --model Qwen/Qwen3-8B -sc '{"model": "Qwen/Qwen3-0.6B"}' --port 8080
  outrider serve --workers local:2
  outrider serve cluster.yaml --host 0.0.0.0 --api-key-file keys.txt
"""


def register(commands: Commands) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(NAME, help=SUMMARY, description=DESCRIPTION, epilog=EXAMPLES)
    parser.set_defaults(run=run)
    parser.add_argument("cluster", metavar="cluster.yaml", nargs="?", help="serve this cluster's targets")
    _add_http(parser)
    add_models(parser, "--model", "--target")
    add_speculation(parser)
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def run(arguments: argparse.Namespace) -> int:
    """Serves until it is told to stop."""
    keys = api_keys(arguments.api_key, arguments.api_key_file)
    settings = _settings(arguments)
    if arguments.cluster is not None:
        return _serve_cluster(arguments, keys, settings)
    from outrider.cluster.api.local_backend import LocalBackend
    from outrider.cluster.api.service import ServedModel, Service
    from outrider.cluster.cli.output import notice
    from outrider.cluster.seeing.files import Seeing
    from outrider.cluster.server import listening_socket, serve

    config = speculative_config(arguments)
    with ExitStack() as opened:
        listener = opened.enter_context(listening_socket(arguments.host, arguments.port))
        seeing = None
        if arguments.trace is not None:
            seeing = opened.enter_context(Seeing(arguments.trace, None, drafting=drafting_of(arguments)))
        _log_to_terminal()
        with notice("loading the models ..."):
            llm = opened.enter_context(load_llm(arguments, config, None if seeing is None else seeing.log))
        if seeing is not None:
            opened.enter_context(seeing.writing(llm.model.tokenizer))

        async def make() -> tuple[Service, Awaitable[None]]:
            backend = LocalBackend(llm)
            return Service([ServedModel(backend, settings)]), backend.failure()

        serve(
            listener,
            make,
            keys=keys,
            max_body=arguments.max_body_size,
            ready=lambda: _announce(arguments, listener.getsockname()[1], settings),
        )
    return 0


def _serve_cluster(arguments: argparse.Namespace, keys: list[str], settings: "ModelSettings") -> int:
    from outrider.cluster.cluster_config import load_config

    refuse_settings_of_this_process(arguments, "serving")
    if arguments.trace is not None:
        raise InvalidConfigError("--trace is for serving in this process; a cluster writes none yet")
    config = load_config(arguments.cluster)
    settings = settings.within(config.limits.max_tokens, config.limits.max_choices)
    from outrider.cluster.cli.output import notice
    from outrider.cluster.interruption import wait_for_signal
    from outrider.cluster.server import listening_socket
    from outrider.cluster.standing import ray_of

    with ExitStack() as opened:
        listener = opened.enter_context(listening_socket(arguments.host, arguments.port))
        port = listener.getsockname()[1]
        opened.enter_context(ray_of(config, debug=getattr(arguments, "debug", False)))
        from outrider.cluster.serve import served

        listener.close()
        with notice("starting the cluster ..."):
            opened.enter_context(
                served(
                    (config, settings),
                    host=arguments.host,
                    port=port,
                    keys=keys,
                    max_body=arguments.max_body_size,
                )
            )
        _announce(arguments, port, settings)
        wait_for_signal()
    return 0


def _announce(arguments: argparse.Namespace, port: int, settings: "ModelSettings") -> None:
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    print(
        f"{settings.names[0]} is served at http://{host}:{port} (Ctrl-C ends it)", file=sys.stderr, flush=True
    )


def _log_to_terminal() -> None:
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for name, level in (
        ("outrider.access", logging.INFO),
        ("outrider", logging.WARNING),
        ("uvicorn", logging.WARNING),
    ):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)
        logger.propagate = False


def _settings(arguments: argparse.Namespace) -> "ModelSettings":
    from outrider.cluster.api.calls import Limits
    from outrider.cluster.api.service import ModelSettings

    leasts = {"max_waiting": 0, "max_tokens": 1, "max_choices": 1, "max_body_size": 1, "port": 0}
    for name, least in leasts.items():
        given = getattr(arguments, name)
        if given is not None and given < least:
            raise InvalidConfigError(f"{name} must be at least {least}, not {given}")
    if not arguments.host:
        raise InvalidConfigError("host must not be empty; 0.0.0.0 means every address")
    if arguments.port > 65535:
        raise InvalidConfigError(f"port must be at most 65535, not {arguments.port}")
    names = arguments.served_model_name or [own_name(arguments)]
    template = (
        None if arguments.chat_template is None else read_text(arguments.chat_template, "chat template")
    )
    return ModelSettings(
        names=tuple(names),
        chat_template=template,
        limits=Limits(max_tokens=arguments.max_tokens, max_choices=arguments.max_choices),
        waiting_per_slot=arguments.max_waiting,
        seed=arguments.seed,
    )


def _add_http(parser: Parser) -> None:
    add = parser.add_argument_group("serving").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1, this machine alone")
    add("--port", type=integer, default=8000, help="default 8000; 0 takes a free one")
    add(
        "--served-model-name",
        metavar="NAME",
        nargs="+",
        help="what clients call the model, several if need be; by default what it is called here",
    )
    add(
        "--api-key", metavar="KEY", action="append", default=[], help="clients need it; repeat it for several"
    )
    add("--api-key-file", metavar="FILE", help="keys, one a line")
    add(
        "--chat-template", metavar="FILE", help="Jinja template of conversations, in place of the model's own"
    )
    add("--max-tokens", metavar="N", type=integer, help="longest output that a request may ask for")
    add("--max-choices", metavar="N", type=integer, default=128, help="texts of one request; default 128")
    add(
        "--max-body-size",
        metavar="N",
        type=integer,
        default=16 << 20,
        help="bytes of a request; default 16 MiB",
    )
    add(
        "--max-waiting",
        metavar="F",
        type=real,
        default=4.0,
        help="texts that may wait for each one being served, before others get 429; default 4",
    )
    add(
        "--trace",
        metavar="FILE",
        help="write a trace of the last steps when the server ends, for 'outrider trace' and ui.perfetto.dev",
    )
    add("--seed", metavar="N", type=integer, help="seeds the requests that bring none; default: a fresh one")
