"""A draft worker behind the real server that answers with lies and garbage, in a thread."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from outrider.actors.draft_engine import ModelDraftEngine, session_blocks
from outrider.actors.draft_process import DraftProcess
from outrider.actors.draft_worker import DraftWorker
from outrider.actors.grpc_server import Peer
from outrider.actors.model_runner import ModelRunner
from outrider.actors.security import Security
from outrider.actors.transport import TargetPeer
from outrider.models.loader import load_model
from outrider.models.numerics import Numerics
from outrider.speculation.replication.messages import (
    PROTOCOL_VERSION,
    DrafterMessage,
    Growth,
    Hello,
    Lost,
    TargetMessage,
    Welcome,
)

Lie = Callable[[Growth, random.Random], DrafterMessage | bytes]


def _other_tokens(growth: Growth, rng: random.Random) -> Growth:
    """Plausible, and wrong."""
    return replace(growth, tokens=growth.tokens[::-1] + rng.randrange(3))


LIES: list[Lie] = [
    _other_tokens,
    lambda growth, _: growth,
    lambda growth, _: replace(growth, tokens=growth.tokens + 100_000),
    lambda growth, rng: replace(growth, first_id=growth.first_id + rng.randrange(1, 50)),
    lambda growth, _: replace(growth, parents=np.zeros_like(growth.parents)),
    lambda growth, _: replace(growth, seen_commit=growth.seen_commit + 1000),
    lambda growth, _: replace(growth, base_length=growth.base_length + 1),
    lambda growth, _: replace(growth, draft_seconds=1e30, final=True),
    lambda growth, _: Lost(session=growth.session, generation=growth.generation, reason="no mood"),
    lambda _, rng: rng.randbytes(40),
]


class _Liar:
    """Stands between a worker and one target."""

    def __init__(self, peer: Peer, seed: int) -> None:
        self._peer, self._rng = peer, random.Random(seed)
        self.lies = 0

    def send(self, message: DrafterMessage) -> None:
        if not isinstance(message, Growth):
            self._peer.send(message)
            return
        what = self._rng.choice(LIES)(message, self._rng)
        self.lies += 1
        if isinstance(what, bytes):
            self._peer.outbox.put(what)
        else:
            self._peer.send(what)


class LyingWorker(DraftWorker):
    """Drafts soundly and says something else."""

    def __init__(self, engine: Any, **settings: Any) -> None:
        super().__init__(engine, **settings)
        self._liars: dict[TargetPeer, _Liar] = {}
        self.connections = 0

    @property
    def lies(self) -> int:
        return sum(each.lies for each in self._liars.values())

    def joined(self, peer: TargetPeer, hello: Hello) -> None:
        self.connections += 1
        self._liars[peer] = _Liar(cast(Peer, peer), self.connections)
        super().joined(self._liars[peer], hello)

    def left(self, peer: TargetPeer) -> None:
        super().left(self._liars[peer])

    def message(self, peer: TargetPeer, message: TargetMessage) -> None:
        super().message(self._liars[peer], message)


@contextmanager
def serving_worker(
    folder: Path, kind: type[DraftWorker], max_sessions: int = 4
) -> Iterator[tuple[str, DraftWorker, DraftProcess]]:
    """Address, worker and its ``DraftProcess``, which runs in a thread of this process."""
    loaded = load_model(str(folder), dtype="auto", numerics=Numerics.FAST, max_model_len=None)
    room = max_sessions * session_blocks(loaded.decoder.max_model_len)
    runner = ModelRunner(loaded.decoder, num_blocks=room)
    worker = kind(ModelDraftEngine(runner, vocab_size=loaded.vocab_size), clock=time.perf_counter)
    welcome = Welcome(
        protocol_version=PROTOCOL_VERSION,
        name="draft-0",
        model="draft",
        vocab_hash=loaded.tokenizer.fingerprint,
        vocab_size=loaded.vocab_size,
        numerics="fast",
        max_model_len=runner.max_model_len,
        max_sessions=max_sessions,
    )
    process = DraftProcess(worker, welcome, host="127.0.0.1", port=0, security=Security())
    thread = threading.Thread(target=process.run)
    thread.start()
    try:
        yield process.address, worker, process
    finally:
        process.stop()
        thread.join()
        runner.cache.check_idle()
