"""Makes a draft worker of a model: what ``outrider draft-worker`` runs."""

import os
import time

from outrider.actors.draft_engine import ModelDraftEngine, session_blocks
from outrider.actors.draft_process import DraftProcess
from outrider.actors.draft_worker import DraftWorker
from outrider.actors.model_runner import ModelRunner
from outrider.actors.security import Security
from outrider.models.loader import load_model
from outrider.models.numerics import Numerics
from outrider.speculation.errors import InvalidConfigError
from outrider.speculation.replication.messages import PROTOCOL_VERSION, Welcome

DEFAULT_MAX_SESSIONS = 16


def make_draft_process(
    model: str,
    *,
    dtype: str,
    max_model_len: int | None,
    max_sessions: int,
    host: str,
    port: int,
    name: str | None,
    security: Security,
) -> DraftProcess:
    """Loads the draft model and listens for targets.

    name: what accepted tokens are attributed to; ``draft-PID`` by default.

    Raises:
        ModelError: the model cannot be loaded.
        InvalidConfigError: a setting is not possible, or the port is taken.
    """
    if max_sessions < 1:
        raise InvalidConfigError(f"max_sessions must be at least 1, not {max_sessions}")
    loaded = load_model(model, dtype=dtype, numerics=Numerics.FAST, max_model_len=max_model_len)
    room = max_sessions * session_blocks(loaded.decoder.max_model_len)
    runner = ModelRunner(loaded.decoder, num_blocks=room)
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
    return DraftProcess(worker, welcome, host=host, port=port, security=security)
