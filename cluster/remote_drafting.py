"""Connects a target engine to draft workers, and starts them where the user wants local ones."""

import time
from collections.abc import Callable

from outrider.actors.draft_pool import DraftPool
from outrider.actors.grpc_client import DraftClient
from outrider.cluster.cluster_security import cluster_security
from outrider.cluster.launcher import LocalWorkers
from outrider.cluster.speculative_config import SpeculativeConfig
from outrider.cluster.workers_config import WorkersConfig
from outrider.models.loader import LoadedModel, context_length
from outrider.speculation.errors import VocabularyMismatchError, WorkerError
from outrider.speculation.replication.messages import NO_LIMIT, PROTOCOL_VERSION, GrowthLimits, Hello

CONNECT_SECONDS = 10.0


class RemoteDrafters:
    """The draft workers of one target, with all that has to be ended with it.

    local: the processes started here, or None where addresses were given.

    Raises:
        WorkerError: a worker could not be started, or none can be reached.
        VocabularyMismatchError: a worker's model has another vocabulary.
        InvalidConfigError: certificates cannot be used.
    """

    def __init__(self, config: SpeculativeConfig, model: LoadedModel, *, dtype: str, numerics: str) -> None:
        assert config.workers is not None
        self.local: LocalWorkers | None = None
        self._client: DraftClient | None = None
        try:
            workers = config.workers
            if workers.addresses:
                addresses = list(workers.addresses)
                security = cluster_security(workers.tls_ca, workers.tls_certificate, workers.tls_key)
            else:
                self.local = LocalWorkers(workers.count, _worker_arguments(config, workers, model, dtype))
                addresses, security = self.local.addresses, self.local.security
            self._client = DraftClient(security=security)
            self.pool = self._connect(self._client, addresses, config, model, numerics)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends streams and local processes; may be called twice."""
        if self._client is not None:
            self._client.close()
        if self.local is not None:
            self.local.close()

    def _connect(
        self,
        client: DraftClient,
        addresses: list[str],
        config: SpeculativeConfig,
        model: LoadedModel,
        numerics: str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> DraftPool:
        hello = Hello(
            protocol_version=PROTOCOL_VERSION,
            model=model.folder.name,
            vocab_hash=model.tokenizer.fingerprint,
            vocab_size=model.vocab_size,
            eos_ids=model.eos_ids,
            numerics=numerics,
        )
        shape = config.shape
        limits = GrowthLimits(
            width=shape.width,
            children=shape.children,
            steps=NO_LIMIT if config.pipeline == "parallel" else shape.depth,
            min_score=shape.min_score,
        )
        channels = [client.connect(address, hello) for address in addresses]
        pool = DraftPool(channels, client, limits=limits, vocab_size=model.vocab_size, clock=clock)
        if not pool.wait_for_workers(CONNECT_SECONDS):
            reason = pool.last_failure or f"{', '.join(addresses)}: no answer"
            kind = VocabularyMismatchError if "vocabulary" in reason else WorkerError
            raise kind(f"no draft worker can be reached: {reason}")
        return pool


def _worker_arguments(
    config: SpeculativeConfig, workers: WorkersConfig, model: LoadedModel, dtype: str
) -> list[str]:
    assert config.model is not None
    limit = min(config.max_model_len or model.decoder.max_model_len, context_length(config.model))
    arguments = ["--draft", config.model, "--dtype", dtype, "--max-sessions", str(workers.max_sessions)]
    return [*arguments, "--max-model-len", str(limit), "--threads", str(workers.threads)]
