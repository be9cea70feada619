"""Connects a target engine to draft workers, and starts them where the user wants local ones."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from outrider.actors.draft_pool import DraftPool
from outrider.actors.grpc_client import DraftClient
from outrider.actors.security import Security
from outrider.actors.tracing import Trace
from outrider.cluster.cluster_security import cluster_security
from outrider.cluster.launcher import LocalWorkers
from outrider.cluster.speculative_config import SpeculativeConfig
from outrider.cluster.workers_config import WorkersConfig
from outrider.models.loader import LoadedModel, context_length
from outrider.speculation.errors import VocabularyMismatchError, WorkerError
from outrider.speculation.pipelines.registry import growth_limits, num_drafters
from outrider.speculation.replication.messages import PROTOCOL_VERSION, GrowthLimits, Hello
from outrider.speculation.request import Request

CONNECT_SECONDS = 10.0


class RemoteDrafters:
    """The draft workers of one target, with all that has to be ended with it.

    local: the processes started here, or None where addresses were given. trace: learns what is
    said to them and by them.

    Raises:
        WorkerError: a worker could not be started, or none can be reached.
        VocabularyMismatchError: a worker's model has another vocabulary.
        InvalidConfigError: certificates cannot be used.
    """

    def __init__(
        self,
        config: SpeculativeConfig,
        model: LoadedModel,
        *,
        device: str,
        dtype: str,
        numerics: str,
        trace: Trace | None = None,
    ) -> None:
        assert config.workers is not None
        self.local: LocalWorkers | None = None
        self._open = ExitStack()
        try:
            settings = ["--device", device, "--dtype", dtype]
            addresses, security = self._find(config.workers, config, model, settings)
            self._client = DraftClient(security=security)
            self._open.callback(self._client.close)
            self._hello = _hello(model, numerics)
            self.pool = DraftPool(
                [self._client.connect(address, self._hello) for address in addresses],
                self._client,
                limits=partial(_limits, config),
                vocab_size=model.vocab_size,
                clock=time.perf_counter,
                num_drafters=partial(_num_drafters, config),
                trace=trace,
            )
            self._open.callback(self.pool.close)
            if config.workers.required:
                self._await_workers()
        except BaseException:
            self.close()
            raise

    def replace(self, addresses: Sequence[str]) -> None:
        """From now on these workers draft; on the engine's thread, between two steps."""
        known = self.pool.addresses
        for address in known:
            if address not in addresses:
                self.pool.remove(address)
        for address in addresses:
            if address not in known:
                self.pool.add(self._client.connect(address, self._hello))

    def close(self) -> None:
        """Ends streams and local processes; may be called twice. Requests are then served plainly."""
        self._open.close()

    def failures(self) -> dict[str, str]:
        """A line for people on each worker that is out of reach now, by address."""
        self.pool.poll()
        ends = {} if self.local is None else self.local.ends
        return {
            address: f"the draft worker at {address} {ends.get(address, f'is out of reach: {reason}')}"
            for address, reason in self.pool.failures.items()
        }

    def _find(
        self, workers: WorkersConfig, config: SpeculativeConfig, model: LoadedModel, settings: list[str]
    ) -> tuple[list[str], Security]:
        """Where the workers listen and what connecting takes; starts them if they are to be local."""
        if not workers.is_local:
            security = cluster_security(workers.tls_ca, workers.tls_certificate, workers.tls_key)
            return list(workers.addresses), security
        self.local = LocalWorkers(workers.count, _worker_arguments(config, workers, model, settings))
        self._open.callback(self.local.close)
        return self.local.addresses, self.local.security

    def _await_workers(self) -> None:
        if self.pool.wait_for_workers(CONNECT_SECONDS):
            return
        failures = self.pool.failures
        reasons = "; ".join(f"{address}: {reason}" for address, reason in failures.items())
        kind = VocabularyMismatchError if "vocabulary" in reasons else WorkerError
        raise kind(f"no draft worker can be used: {reasons or 'none answered'}")


def _hello(model: LoadedModel, numerics: str) -> Hello:
    return Hello(
        protocol_version=PROTOCOL_VERSION,
        model=model.folder.name,
        vocab_hash=model.tokenizer.fingerprint,
        vocab_size=model.vocab_size,
        eos_ids=model.eos_ids,
        numerics=numerics,
    )


def _limits(config: SpeculativeConfig, request: Request) -> GrowthLimits:
    return growth_limits(request.pipeline or config.pipeline, config.shape)


def _num_drafters(config: SpeculativeConfig, request: Request) -> int:
    assert config.workers is not None
    return num_drafters(request.pipeline or config.pipeline, config.workers.per_request)


def _worker_arguments(
    config: SpeculativeConfig, workers: WorkersConfig, model: LoadedModel, settings: list[str]
) -> list[str]:
    assert config.model is not None
    limit = min(config.max_model_len or model.decoder.max_model_len, context_length(config.model))
    arguments = [*settings, "--draft", config.model, "--max-sessions", str(workers.max_sessions)]
    arguments += ["--tensor-parallel-size", str(config.draft_tensor_parallel_size)]
    if config.quantization is not None:
        arguments += ["--quantization", config.quantization]
    return [*arguments, "--max-model-len", str(limit), "--threads", str(workers.threads)]
