"""``LLM``: a target in this very process, its drafter there too or elsewhere, with vLLM's shape."""

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from outrider.actors.draft_engine import LocalModelDrafting, ModelDraftEngine, session_blocks
from outrider.actors.drafting import DraftEngine, NgramEngine
from outrider.actors.model_runner import ModelRunner
from outrider.actors.running_batch import RunningBatch, Ticket
from outrider.actors.target_engine import TargetEngine, TargetModel
from outrider.cluster.generation import OnStep, Prompt, TextGenerator
from outrider.cluster.loading import check_sizes, load_target, open_network, step_costs
from outrider.cluster.remote_drafting import RemoteDrafters
from outrider.cluster.speculative_config import SpeculativeConfig
from outrider.models.demo import pair
from outrider.models.loader import context_length
from outrider.models.numerics import MAX_ROWS, Numerics
from outrider.models.parallel import RankGroup
from outrider.models.tokenizer import IncrementalDetokenizer, Tokenizer, check_same_vocabulary
from outrider.speculation.errors import InvalidConfigError, InvalidRequestError, VocabularyMismatchError
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.pipelines.registry import PIPELINES
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.request import Completion, Request, StepOutput
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.tree import MAX_TREE_DEPTH
from outrider.speculation.types import IntArray
from outrider.speculation.verifiers.registry import make_verifier


class LLM(TextGenerator):
    """Generates text offline, exactly as the target alone would, and faster.

    model: folder or hub id of the target; None takes the embedded demo pair.
    speculative_config: see ``SpeculativeConfig``; None decodes plainly, but for the
        embedded pair, whose draft model then drafts. ``{}`` looks n-grams up.
    dtype: ``auto`` (as saved; float32 for float16), ``bfloat16``, ``float32`` or ``float64``.
    numerics: ``canonical``, the default, gives a row the same bits whatever runs beside
        it; ``fast`` saves some time and may leave plain decoding at a near-tie.
    max_model_len: tokens of the longest sequence.
    max_num_seqs: requests served at once. max_num_batched_tokens: rows of one forward, of texts and
        trees together; fewer make long prompts hold up the others for less.
    kv_cache_memory: bytes of the KV cache, or a size such as ``4GiB``; by default what
        ``max_num_seqs`` full sequences could use. gpu_memory_utilization: then, the share of the
        device's memory, of the machine's on CPU, that weights and KV may take; half by default.
    enable_prefix_caching: whether texts begin with what earlier ones left in the KV cache.
    target_profile: a JSON file with the target's measured step times, which is written if it is not
        there; None measures them at each start, for up to two seconds.
    seed: seeds the requests that bring none; None draws fresh ones.
    tensor_parallel_size: processes that hold a part of the target each, this one the first of them; they
        share PyTorch's threads. ranks: instead, the group of those that have been started already, in
        which this process is rank 0.

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
        dtype: str = "auto",
        numerics: str = "canonical",
        max_model_len: int | None = None,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = MAX_ROWS,
        kv_cache_memory: int | str | None = None,
        gpu_memory_utilization: float | None = None,
        enable_prefix_caching: bool = True,
        target_profile: str | None = None,
        seed: int | None = None,
        tensor_parallel_size: int = 1,
        ranks: RankGroup | None = None,
    ) -> None:
        if model is None and speculative_config is None:
            speculative_config = {"model": str(pair.DRAFT)}
        config = None if speculative_config is None else SpeculativeConfig.parse(speculative_config)
        kind = _numerics(numerics)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise InvalidConfigError(f"seed must be None or a non-negative integer, not {seed!r}")
        self._seeds = np.random.default_rng(seed)
        check_sizes(max_num_seqs, max_num_batched_tokens, tensor_parallel_size)
        self.max_num_seqs = max_num_seqs
        shape = TreeShape() if config is None else config.shape
        costs = CostEstimates(max_rows=max_num_batched_tokens)
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
                max_nodes=shape.num_speculative_tokens,
                kv_cache_memory=kv_cache_memory,
                gpu_memory_utilization=gpu_memory_utilization,
                enable_prefix_caching=enable_prefix_caching,
                dtype=dtype,
                numerics=kind,
                max_model_len=max_model_len,
            )
            if config is not None:
                costs = step_costs(runner, max_num_batched_tokens, target_profile)
            if config is not None and config.workers is not None:
                self.workers = RemoteDrafters(config, self.model, dtype=dtype, numerics=str(kind))
                opened.callback(self.workers.close)
            elif config is not None:
                local = self._make_drafting(opened, config, dtype, enable_prefix_caching)
        except BaseException:
            self.close()
            raise
        pool = None if self.workers is None else self.workers.pool
        self.engine = TargetEngine(
            TargetModel(
                runner=runner,
                vocab_size=self.model.vocab_size,
                eos_ids=self.model.eos_ids,
                detokenizer=partial(_detokenizer, self.model.tokenizer),
            ),
            verifier=make_verifier("coupled" if config is None else config.verification),
            drafting=local or pool,
            remote=pool,
            shape=shape,
            make_pipeline=PIPELINES["parallel" if config is None or pool is None else config.pipeline],
            costs=costs,
            max_rows=max_num_batched_tokens,
        )

    def close(self) -> None:
        """Ends the processes that were started.

        Without draft workers the engine decodes plainly afterwards, without its other ranks no more.
        """
        self._finalizer()

    def failures(self) -> dict[str, str]:
        """See ``TextGenerator``: draft workers."""
        return {} if self.workers is None else self.workers.failures()

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
        text, ids = self._tokenize(prompt)
        if params.seed is None:
            params = replace(params, seed=int(self._seeds.integers(2**63)))
        requests = [
            Request(prompt_ids=ids, params=params, choice=choice, speculative=speculative, pipeline=pipeline)
            for choice in range(params.n)
        ]
        return text, requests

    def steps(self, request: Request) -> Iterator[StepOutput | Completion]:
        """See ``TextGenerator``."""
        batch = RunningBatch(self.engine, 1)
        try:
            ticket = batch.submit(request)
            while not ticket.finished:
                for _, output in batch.step():
                    if output is not None and ticket.error is None:
                        yield output
            yield _completion(ticket)
        finally:
            batch.close()

    def complete_all(
        self, requests: Iterable[Request], on_step: OnStep | None = None
    ) -> Iterator[Completion]:
        """See ``TextGenerator``; ``max_num_seqs`` at once."""
        waiting = iter(requests)
        batch = RunningBatch(self.engine, self.max_num_seqs)
        unfinished: deque[Ticket] = deque()
        try:
            while True:
                unfinished += [batch.submit(request) for request in islice(waiting, batch.room)]
                if not unfinished:
                    return
                for ticket, output in batch.step():
                    if on_step is not None and output is not None:
                        on_step(ticket.request, output)
                while unfinished and unfinished[0].finished:
                    yield _completion(unfinished.popleft())
        finally:
            batch.close()

    def _require_pipeline(self, name: str) -> None:
        if name not in PIPELINES:
            raise InvalidRequestError(f"pipeline must be one of {', '.join(PIPELINES)}, not {name!r}")
        if name != "serial" and self.workers is None:
            raise InvalidRequestError(f"pipeline {name!r} needs draft workers")

    def _tokenize(self, prompt: Prompt) -> tuple[str, IntArray]:
        """Text and token ids of a prompt given as either."""
        tokenizer, limit = self.model.tokenizer, self.model.decoder.max_model_len
        ids = tokenizer.encode(_encodable(prompt)) if isinstance(prompt, str) else _token_ids(prompt)
        if not ids:
            raise InvalidRequestError(f"the prompt {prompt!r} has no tokens")
        vocab = self.model.vocab_size
        if min(ids) < 0 or max(ids) >= vocab:
            strange = next(each for each in ids if not 0 <= each < vocab)
            raise InvalidRequestError(f"prompt token {strange} is not in the vocabulary of {vocab}")
        if len(ids) >= limit:
            raise InvalidRequestError(
                f"the prompt has {len(ids)} tokens and leaves no room in a context of {limit}"
            )
        text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
        return text, np.array(ids, np.int64)

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
            dtype=dtype,
            numerics=Numerics.FAST,
            max_model_len=limit,
        )
        check_same_vocabulary(self.model.tokenizer, draft.tokenizer)
        if draft.vocab_size < self.model.vocab_size:
            raise VocabularyMismatchError(
                f"the draft's head has {draft.vocab_size} tokens, the target's {self.model.vocab_size}"
            )
        runner = ModelRunner(
            network,
            num_blocks=self.max_num_seqs * session_blocks(limit),
            prefix_caching=prefix_caching,
        )
        return LocalModelDrafting(
            ModelDraftEngine(runner, vocab_size=self.model.vocab_size),
            children=config.shape.children,
            eos_ids=self.model.eos_ids,
        )


def _detokenizer(tokenizer: Tokenizer, request: Request) -> IncrementalDetokenizer:
    return IncrementalDetokenizer(tokenizer, request.params.skip_special_tokens)


def _completion(ticket: Ticket) -> Completion:
    if ticket.error is not None:
        raise ticket.error
    assert ticket.completion is not None
    return ticket.completion


def _encodable(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"the prompt is not valid text: {error}") from None
    return prompt


def _token_ids(prompt: Sequence[int]) -> list[int]:
    if not isinstance(prompt, (Sequence, np.ndarray)):
        raise InvalidRequestError(f"a prompt is text or token ids, and {prompt!r} is neither")
    for each in prompt:
        if isinstance(each, bool) or not isinstance(each, (int, np.integer)):
            raise InvalidRequestError(f"a prompt is text or token ids, and {each!r} is neither")
    return [int(each) for each in prompt]


def _numerics(name: str) -> Numerics:
    try:
        return Numerics(name)
    except ValueError:
        raise InvalidConfigError(f"numerics must be {' or '.join(Numerics)}, not {name!r}") from None
