"""``LLM``: a target in this very process, its drafter there too or elsewhere, with vLLM's shape."""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from outrider.actors.draft_engine import LocalModelDrafting, ModelDraftEngine
from outrider.actors.drafting import DraftEngine, NgramEngine
from outrider.actors.model_runner import ModelRunner
from outrider.actors.running_batch import RunningBatch, Ticket
from outrider.actors.target_engine import TargetEngine, TargetModel
from outrider.actors.tracing import Trace
from outrider.cluster.device_memory import draft_blocks
from outrider.cluster.generation import OnStep, Prompt, Results, TextGenerator
from outrider.cluster.loading import (
    check_sizes,
    load_target,
    numerics_of,
    open_network,
    rows_of,
    step_costs,
)
from outrider.cluster.model_card import ModelCard
from outrider.cluster.preparation import Preparation
from outrider.cluster.remote_drafting import RemoteDrafters
from outrider.cluster.speculative_config import SpeculativeConfig
from outrider.models.demo import pair
from outrider.models.device import choose_device
from outrider.models.loader import context_length
from outrider.models.numerics import Numerics
from outrider.models.parallel import RankGroup
from outrider.models.tokenizer import IncrementalDetokenizer, Tokenizer, check_same_vocabulary
from outrider.speculation.errors import (
    InvalidConfigError,
    InvalidRequestError,
    OutriderError,
    VocabularyMismatchError,
)
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.pipelines.registry import PIPELINES
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.request import Completion, Request, StepOutput
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.tree import MAX_TREE_DEPTH
from outrider.speculation.verifiers.registry import make_verifier


class LLM(TextGenerator):
    """Generates text offline, exactly as the target alone would, and faster.

    model: folder or hub id of the target; None takes the embedded demo pair.
    speculative_config: see ``SpeculativeConfig``; None decodes plainly, but for the
        embedded pair, whose draft model then drafts. ``{}`` looks n-grams up.
    device: of the target and of a draft model in this process: ``cpu``, ``cuda``, or ``auto``, which takes
        CUDA where there is some.
    dtype: ``auto`` (as saved; on CPU float32 for float16), ``bfloat16``, ``float32``, or on CPU ``float64``.
    numerics: ``canonical``, the default on CPU, gives a row the same bits whatever runs beside
        it; ``fast``, the default on CUDA, saves some time and may leave plain decoding at a near-tie.
    max_model_len: tokens of the longest sequence.
    max_num_seqs: requests served at once. max_num_batched_tokens: rows of one forward, of texts and
        trees together; fewer make long prompts hold up the others for less. By default and at most 64;
        on CUDA with ``fast`` 512, and at most 2048.
    kv_cache_memory: bytes of the KV cache, or a size such as ``4GiB``; by default what
        ``max_num_seqs`` full sequences could use. gpu_memory_utilization: then, the share of the
        device's memory, of the machine's on CPU, that weights and KV may take; by default 0.9, on CPU 0.5.
    enable_prefix_caching: whether texts begin with what earlier ones left in the KV cache.
    target_profile: a JSON file with the target's measured step times, which is written if it is not
        there; None measures them at each start, for up to two seconds.
    seed: seeds the requests that bring none; None draws fresh ones.
    quantization: of the target, and so None; a drafter's is a key of ``speculative_config``.
    tensor_parallel_size: processes that hold a part of the target each, this one the first of them; they
        share PyTorch's threads, and on CUDA each has a device of its own. ranks: instead, the group of
        those that have been started already, in which this process is rank 0.
    trace: is told what target and drafters do, and when; see ``EventLog``.

    Processes that it started, draft workers and ranks of the target, end with it: at ``close``, at the
    end of a ``with`` block, or when it is collected.

    Raises:
        WorkerError: no draft worker can be started or reached, or a rank cannot be started.
        TargetGroupError: a rank ended before it was ready.
        ModelError: a model cannot be loaded, or the vocabularies differ.
        InvalidConfigError: a setting is not possible.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        speculative_config: Mapping[str, Any] | None = None,
        device: str = "auto",
        dtype: str = "auto",
        numerics: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int | None = None,
        kv_cache_memory: int | str | None = None,
        gpu_memory_utilization: float | None = None,
        enable_prefix_caching: bool = True,
        target_profile: str | None = None,
        seed: int | None = None,
        quantization: str | None = None,
        tensor_parallel_size: int = 1,
        ranks: RankGroup | None = None,
        trace: Trace | None = None,
    ) -> None:
        if quantization is not None:
            raise InvalidConfigError(
                f"quantization must be a drafter's, not {quantization!r}: the target's numbers "
                "must be its own (speculative_config has the drafter's)"
            )
        if model is None and speculative_config is None:
            speculative_config = {"model": str(pair.DRAFT)}
        config = None if speculative_config is None else SpeculativeConfig.parse(speculative_config)
        self.device = choose_device(device)
        kind = numerics_of(numerics, self.device)
        max_rows = rows_of(max_num_batched_tokens, kind, self.device)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise InvalidConfigError(f"seed must be None or a non-negative integer, not {seed!r}")
        check_sizes(max_num_seqs, max_rows, tensor_parallel_size)
        self.max_num_seqs = max_num_seqs
        self.tensor_parallel_size = tensor_parallel_size if ranks is None else ranks.size
        shape = TreeShape() if config is None else config.shape
        costs = CostEstimates(max_rows=max_rows)
        self.workers: RemoteDrafters | None = None
        """Draft workers in other processes; None without any."""
        local: DraftEngine | None = None
        opened = ExitStack()
        self._finalizer = weakref.finalize(self, opened.close)
        try:
            self.model, runner = load_target(
                opened,
                str(pair.TARGET) if model is None else model,
                ranks or tensor_parallel_size,
                max_num_seqs=max_num_seqs,
                max_rows=max_rows,
                max_nodes=shape.num_speculative_tokens,
                kv_cache_memory=kv_cache_memory,
                gpu_memory_utilization=gpu_memory_utilization,
                enable_prefix_caching=enable_prefix_caching,
                device=self.device,
                dtype=dtype,
                numerics=kind,
                max_model_len=max_model_len,
            )
            self._runner = runner
            if config is not None:
                costs = step_costs(runner, max_rows, target_profile)
            if config is not None and config.workers is not None:
                self.workers = RemoteDrafters(
                    config,
                    self.model,
                    device=self.device.type,
                    dtype=dtype,
                    numerics=str(kind),
                    trace=trace,
                )
                opened.callback(self.workers.close)
            elif config is not None:
                local = self._make_drafting(opened, config, dtype, enable_prefix_caching)
        except BaseException:
            self.close()
            raise
        self.preparation = Preparation(
            self.model.tokenizer,
            vocab_size=self.model.vocab_size,
            max_model_len=self.model.decoder.max_model_len,
            seeds=np.random.default_rng(seed),
        )
        pool = None if self.workers is None else self.workers.pool
        self.engine = TargetEngine(
            TargetModel(
                runner=runner,
                vocab_size=self.model.vocab_size,
                eos_ids=self.model.eos_ids,
                detokenizer=partial(_detokenizer, self.model.tokenizer),
                device=self.device,
            ),
            verifier=make_verifier("coupled" if config is None else config.verification),
            drafting=local or pool,
            remote=pool,
            shape=shape,
            make_pipeline=PIPELINES["parallel" if config is None or pool is None else config.pipeline],
            costs=costs,
            max_rows=max_rows,
            trace=trace,
        )

    @property
    def kv_cache_usage(self) -> float:
        """Share of the target's KV blocks that requests hold."""
        pool = self._runner.cache.blocks
        return 1 - pool.num_free / pool.num_blocks

    @property
    def drafting(self) -> str:
        """What drafts, in words."""
        if self.workers is not None:
            return "draft workers"
        return {NgramEngine: "ngram", LocalModelDrafting: "draft model"}.get(
            type(self.engine.drafting), "none"
        )

    def close(self) -> None:
        """Ends the processes that were started.

        Without draft workers the engine decodes plainly afterwards, without its other ranks no more.
        """
        self._finalizer()

    def failures(self) -> dict[str, str]:
        """See ``TextGenerator``: draft workers."""
        return {} if self.workers is None else self.workers.failures()

    def describe(self) -> ModelCard:
        """See ``TextGenerator``."""
        return ModelCard.of(self)

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        speculative: bool = True,
        pipeline: str | None = None,
    ) -> tuple[str, list[Request]]:
        """See ``TextGenerator``."""
        if pipeline is not None:
            self._require_pipeline(pipeline)
        return self.preparation.requests(prompt, params, speculative=speculative, pipeline=pipeline)

    def steps(self, request: Request) -> Iterator[StepOutput | Completion]:
        """See ``TextGenerator``."""
        batch = RunningBatch(self.engine, 1)
        try:
            ticket = batch.submit(request)
            while not ticket.finished:
                for _, output in batch.step():
                    if output is not None and ticket.error is None:
                        yield output
            result = _result(ticket)
            if isinstance(result, OutriderError):
                raise result
            yield result
        finally:
            batch.close()

    def complete_unordered(self, requests: Iterable[Request], on_step: OnStep | None = None) -> Results:
        """See ``TextGenerator``; ``max_num_seqs`` at once."""
        waiting = iter(requests)
        batch = RunningBatch(self.engine, self.max_num_seqs)
        try:
            while True:
                for request in islice(waiting, batch.room):
                    batch.submit(request)
                if not batch.num_running + batch.num_waiting:
                    return
                for ticket, output in batch.step():
                    if on_step is not None and output is not None:
                        on_step(ticket.request, output)
                    if ticket.finished:
                        yield ticket.request, _result(ticket)
        finally:
            batch.close()

    def _require_pipeline(self, name: str) -> None:
        if name not in PIPELINES:
            raise InvalidRequestError(f"pipeline must be one of {', '.join(PIPELINES)}, not {name!r}")
        if name != "serial" and self.workers is None:
            raise InvalidRequestError(f"pipeline {name!r} needs draft workers")

    def _make_drafting(
        self, opened: ExitStack, config: SpeculativeConfig, dtype: str, prefix_caching: bool
    ) -> DraftEngine:
        if config.method == "ngram":
            return NgramEngine(
                prompt_lookup_min=config.prompt_lookup_min,
                prompt_lookup_max=config.prompt_lookup_max,
                num_speculative_tokens=min(config.num_speculative_tokens, MAX_TREE_DEPTH),
            )
        assert config.model is not None
        limit = min(config.max_model_len or self.model.decoder.max_model_len, context_length(config.model))
        draft, network = open_network(
            opened,
            config.model,
            config.draft_tensor_parallel_size,
            device=self.device,
            dtype=dtype,
            numerics=Numerics.FAST,
            max_model_len=limit,
            quantization=config.quantization,
        )
        check_same_vocabulary(self.model.tokenizer, draft.tokenizer)
        if draft.vocab_size < self.model.vocab_size:
            raise VocabularyMismatchError(
                f"the draft's head has {draft.vocab_size} tokens, the target's {self.model.vocab_size}"
            )
        runner = ModelRunner(
            network,
            num_blocks=draft_blocks(network, self.max_num_seqs),
            prefix_caching=prefix_caching,
        )
        return LocalModelDrafting(
            ModelDraftEngine(runner, vocab_size=self.model.vocab_size),
            children=config.shape.children,
            eos_ids=self.model.eos_ids,
        )


def _detokenizer(tokenizer: Tokenizer, request: Request) -> IncrementalDetokenizer:
    return IncrementalDetokenizer(tokenizer, request.params.skip_special_tokens)


def _result(ticket: Ticket) -> Completion | OutriderError:
    result = ticket.completion or ticket.error
    assert result is not None
    return result
