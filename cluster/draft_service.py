"""Makes a draft worker of a model: what ``outrider draft-worker`` runs."""

import os
import time
from contextlib import ExitStack

from outrider.actors.draft_engine import ModelDraftEngine
from outrider.actors.draft_process import DraftProcess
from outrider.actors.draft_worker import DraftWorker
from outrider.actors.model_runner import ModelRunner
from outrider.actors.security import Security
from outrider.cluster.device_memory import draft_blocks
from outrider.cluster.loading import check_ranks, open_network
from outrider.models.device import choose_device
from outrider.models.numerics import Numerics
from outrider.speculation.errors import InvalidConfigError
from outrider.speculation.replication.messages import PROTOCOL_VERSION, Welcome

DEFAULT_MAX_SESSIONS = 16


def make_draft_process(
    model: str,
    *,
    device: str = "auto",
    dtype: str,
    max_model_len: int | None,
    max_sessions: int,
    tensor_parallel_size: int = 1,
    quantization: str | None = None,
    host: str,
    port: int,
    name: str | None,
    security: Security,
) -> DraftProcess:
    """Loads the draft model and listens for targets.

    tensor_parallel_size: processes that share the model, this one the first of them.
    quantization: of its weights, see ``load_model``.
    name: what accepted tokens are attributed to; ``draft-PID`` by default.

    Raises:
        ModelError: the model cannot be loaded.
        InvalidConfigError: a setting is not possible, or the port is taken.
    """
    if max_sessions < 1:
        raise InvalidConfigError(f"max_sessions must be at least 1, not {max_sessions}")
    check_ranks(tensor_parallel_size)
    opened = ExitStack()
    loaded, network = open_network(
        opened,
        model,
        tensor_parallel_size,
        device=choose_device(device),
        dtype=dtype,
        numerics=Numerics.FAST,
        max_model_len=max_model_len,
        quantization=quantization,
    )
    runner = ModelRunner(network, num_blocks=draft_blocks(network, max_sessions))
    engine = ModelDraftEngine(runner, vocab_size=loaded.vocab_size)
    welcome = Welcome(
        protocol_version=PROTOCOL_VERSION,
        name=name or f"draft-{os.getpid()}",
        model=loaded.folder.name,
        vocab_hash=loaded.tokenizer.fingerprint,
        vocab_size=loaded.vocab_size,
        numerics=str(Numerics.FAST),
        max_model_len=runner.max_model_len,
        max_sessions=max_sessions,
    )
    worker = DraftWorker(engine, clock=time.perf_counter)
    try:
        return DraftProcess(worker, welcome, host=host, port=port, security=security, at_end=opened.close)
    except BaseException:
        opened.close()
        raise
