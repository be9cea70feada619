"""The target side: a request's life from prompt to finish, in steps of schedule, run, commit."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from outrider.actors.drafting import DraftEngine, DraftSession
from outrider.speculation.errors import ModelError
from outrider.speculation.pipelines.serial import CostEstimates, Grow, SerialPipeline, TreeShape
from outrider.speculation.request import Request, StepOutput
from outrider.speculation.sampling import NO_TOKEN, LogitProcessor, TokenChooser, row_positions
from outrider.speculation.statistics import SpeculationStatistics
from outrider.speculation.stopping import StopChecker, TextSource, ending_ids
from outrider.speculation.tree import ROOT, DraftTree
from outrider.speculation.types import IntArray, Verdict, Verifier

Clock = Callable[[], float]


class Sequence(Protocol):
    """What a runner keeps for one request."""

    def close(self) -> None:
        """Frees it."""
        ...


AnySequence = TypeVar("AnySequence", bound=Sequence)


class TargetRunner(Protocol[AnySequence]):
    """The target network as the engine sees it; see ``ModelRunner`` for the meaning."""

    @property
    def max_model_len(self) -> int: ...

    def open(self, max_tokens: int) -> AnySequence: ...

    def prefill(self, sequence: AnySequence, tokens: IntArray) -> None: ...

    def verify(self, sequence: AnySequence, root: int, tree: DraftTree) -> torch.Tensor: ...

    def accept(self, sequence: AnySequence, nodes: IntArray) -> None: ...


@dataclass(frozen=True, kw_only=True)
class TargetModel(Generic[AnySequence]):
    """What the engine must know of its target.

    vocab_size: real tokens; the head may be padded beyond them.
    detokenizer: makes a fresh one for each request.
    """

    runner: TargetRunner[AnySequence]
    vocab_size: int
    eos_ids: tuple[int, ...]
    detokenizer: Callable[[Request], TextSource]


class TargetEngine:
    """Serves requests, one step at a time each, with or without a drafter."""

    def __init__(
        self,
        target: TargetModel[Any],
        *,
        verifier: Verifier,
        drafting: DraftEngine | None,
        shape: TreeShape,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.target, self.verifier, self.drafting, self.shape = target, verifier, drafting, shape
        self.clock = clock
        self.costs = CostEstimates()

    def start(self, request: Request) -> "RequestRun":
        """Admits a request and caches its prompt.

        Raises:
            InvalidRequestError: the prompt or a token id does not fit the model.
        """
        return RequestRun(self, request)


class RequestRun:
    """One request in flight. ``close`` frees its KV, whether it has finished or not."""

    def __init__(self, engine: TargetEngine, request: Request) -> None:
        self._engine, target = engine, engine.target
        params = request.params
        self._max_model_len = target.runner.max_model_len
        self._stop = StopChecker(
            params, target.eos_ids, len(request.prompt_ids), self._max_model_len, target.detokenizer(request)
        )
        self._processor = LogitProcessor(
            params, request.prompt_ids, target.vocab_size, ending_ids(params, target.eos_ids)
        )
        self._chooser = TokenChooser(params, request.choice)
        self._pipeline = SerialPipeline(engine.shape, engine.costs)
        self.stats = SpeculationStatistics()
        self.finished = False
        self._length = len(request.prompt_ids)
        self._root = int(request.prompt_ids[-1])
        self._limit = min(self._length + params.max_tokens, self._max_model_len)
        self._sequence = target.runner.open(self._limit + engine.shape.num_speculative_tokens + 1)
        self._draft: DraftSession | None = None
        try:
            if engine.drafting is not None and request.speculative:
                self._draft = engine.drafting.open(request)
            target.runner.prefill(self._sequence, request.prompt_ids[:-1])
        except BaseException:
            self.close()
            raise

    def step(self) -> StepOutput:
        """Commits at least one token."""
        tree = self._schedule()
        verdict = self._run(tree)
        return self._commit(tree, verdict)

    def close(self) -> None:
        """Frees what the request holds."""
        self.finished = True
        self._sequence.close()
        if self._draft is not None:
            self._draft.close()

    def __enter__(self) -> "RequestRun":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def text(self) -> str:
        """The output so far."""
        return self._stop.text

    def _schedule(self) -> DraftTree:
        """Lets the drafter grow while that pays; the subtree to verify."""
        draft = self._draft
        # The last token is the target's own whatever is drafted.
        if draft is None or self._length + 1 >= self._limit:
            return DraftTree.empty()
        while isinstance(action := self._pipeline.decide(draft.tree), Grow):
            began = self._engine.clock()
            rows = draft.grow(action.width)
            seconds = self._engine.clock() - began
            self._pipeline.observe_growth(rows, seconds)
            self.stats.draft_steps += 1
            self.stats.draft_rows += rows
            self.stats.draft_seconds += seconds
        tree, _ = draft.tree.select(action.budget)
        return tree

    @torch.inference_mode()
    def _run(self, tree: DraftTree) -> Verdict:
        """One forward of the target, and what it says of the tree."""
        began = self._engine.clock()
        logits = self._engine.target.runner.verify(self._sequence, self._root, tree)
        processed = self._processor.process(logits, tree)
        tokens = self._chooser.choose(processed, row_positions(self._length, tree))
        verdict = self._engine.verifier.verify(tree, tokens)
        if verdict.token == NO_TOKEN:
            position = self._length + verdict.num_accepted_tokens
            raise ModelError(f"the model gave NaN or infinite logits for the token at position {position}")
        self._observe(tree, verdict, self._engine.clock() - began)
        return verdict

    def _observe(self, tree: DraftTree, verdict: Verdict, seconds: float) -> None:
        rows = len(tree) + 1
        self.stats.target_steps += 1
        self.stats.target_rows += rows
        self.stats.target_seconds += seconds
        if self._draft is not None:
            self.stats.record_verification(
                num_draft_tokens=len(tree),
                num_accepted_tokens=verdict.num_accepted_tokens,
                drafter=self._draft.name,
            )
            with_children = np.isin(np.append(verdict.accepted, ROOT), tree.parent_indices)
            self._pipeline.observe_verdict(verdict, int(with_children.sum()), rows, seconds)

    def _commit(self, tree: DraftTree, verdict: Verdict) -> StepOutput:
        """Makes the accepted path and the target's token part of the text."""
        self._engine.target.runner.accept(self._sequence, verdict.accepted)
        drafted = tree.tokens[verdict.accepted]
        tokens = np.append(drafted, verdict.token)
        outcome = self._stop.push(tokens.tolist())
        kept = tokens[: outcome.num_kept]
        self.finished = outcome.finish_reason is not None
        self._length += len(kept)
        self._root = int(kept[-1])
        self.stats.num_output_tokens += len(kept)
        if not self.finished:
            self._processor.commit(kept)
            self._reroot(kept)
        return StepOutput(
            token_ids=kept.tolist(),
            num_accepted=min(len(kept), len(drafted)),
            text=self._stop.take_text(),
            finish_reason=outcome.finish_reason,
            stop_reason=outcome.stop_reason,
        )

    def _reroot(self, tokens: IntArray) -> None:
        if self._draft is not None:
            had_tree = len(self._draft.tree) > 0
            survived = self._draft.commit(tokens).survived
            self.stats.reroot_hits += had_tree and survived
            self.stats.reroot_misses += had_tree and not survived
