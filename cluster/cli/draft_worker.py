"""``outrider draft-worker``: drafts for targets that connect."""

import argparse
import json
import signal
import threading
from dataclasses import asdict
from typing import Any

from outrider.cluster.child import stop_at_end_of_input
from outrider.cluster.cli.arguments import Commands, integer
from outrider.speculation.errors import InvalidConfigError

NAME = "draft-worker"
SUMMARY = "serve a draft model to targets in other processes"

DESCRIPTION = """\
Drafts for every target that connects, until SIGTERM or Ctrl-C.

Prints one line of JSON with the address once it listens, and one with its statistics when it
ends. Beyond this machine the environment variable OUTRIDER_CLUSTER_TOKEN must hold a token, the
same one as the targets'.
"""

EXAMPLES = """\
examples:
  outrider draft-worker
  outrider draft-worker --draft ./draft --quantization int8 --port 7000 --threads 2
  outrider generate --workers 127.0.0.1:7000 --prompt 'def fibonacci(n):'
"""


def register(commands: Commands) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(NAME, help=SUMMARY, description=DESCRIPTION, epilog=EXAMPLES)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--draft", metavar="DIR|ID", help="draft model; that of the embedded demo pair by default")
    add("--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1")
    add("--port", metavar="N", type=integer, default=0, help="port to listen on; default 0: a free one")
    add("--name", help="what accepted tokens are attributed to; default draft-PID")
    add("--device", default="auto", help="cpu, cuda, or auto (the default): cuda where there is one")
    add("--dtype", default="auto", help="auto (as saved, the default), bfloat16, float32 or float64")
    add(
        "--quantization",
        metavar="Q",
        help="int8: quantise the draft's weights at load; faster, and it guesses a little worse",
    )
    add(
        "--max-model-len",
        metavar="N",
        type=integer,
        help="tokens of the longest text; the model's by default",
    )
    add(
        "--max-sessions",
        metavar="N",
        type=integer,
        default=16,
        help="requests drafted for at once; default 16",
    )
    add("--threads", metavar="N", type=integer, default=1, help="CPU threads; default 1")
    add(
        "-tp",
        "--tensor-parallel-size",
        metavar="N",
        type=integer,
        default=1,
        help="processes that share the model and its threads; default 1",
    )
    add("--tls-certificate", metavar="FILE", help="PEM certificate; with it the worker speaks TLS only")
    add("--tls-key", metavar="FILE", help="PEM key of the certificate")
    add("--tls-ca", metavar="FILE", help="PEM authorities; targets must show a certificate from one of them")
    add("--exit-with-stdin", action="store_true", help="end when standard input is closed")
    add("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")


def run(arguments: argparse.Namespace) -> int:
    """Loads the model, says where it listens, and drafts."""
    if arguments.threads < 1:
        raise InvalidConfigError(f"threads must be at least 1, not {arguments.threads}")
    if not 0 <= arguments.port <= 65535:
        raise InvalidConfigError(f"port must be from 0 to 65535, not {arguments.port}")
    if arguments.exit_with_stdin:
        # At once while the model is loaded, after a step later on.
        threading.Thread(target=stop_at_end_of_input, daemon=True).start()
    from outrider.cluster.cluster_security import TOKEN_VARIABLE, cluster_security

    security = cluster_security(arguments.tls_ca, arguments.tls_certificate, arguments.tls_key)
    from outrider.actors.grpc_server import require_token

    # What can be refused without a model is, before seconds go into loading one.
    try:
        require_token(arguments.host, security)
    except InvalidConfigError as error:
        raise InvalidConfigError(f"{error}: set {TOKEN_VARIABLE}") from None
    import torch

    from outrider.cluster.draft_service import make_draft_process
    from outrider.models.demo import pair

    torch.set_num_threads(arguments.threads)
    process = make_draft_process(
        arguments.draft or str(pair.DRAFT),
        device=arguments.device,
        dtype=arguments.dtype,
        max_model_len=arguments.max_model_len,
        max_sessions=arguments.max_sessions,
        tensor_parallel_size=arguments.tensor_parallel_size,
        quantization=arguments.quantization,
        host=arguments.host,
        port=arguments.port,
        name=arguments.name,
        security=security,
    )
    _stop_on_signals(process)
    print(json.dumps({"address": process.address}), flush=True)
    print(json.dumps({"statistics": asdict(process.run())}), flush=True)
    return 0


def _stop_on_signals(process: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: process.stop())
