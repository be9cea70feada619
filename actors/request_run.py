"""One request in flight at the target: what it wants verified, and what a verdict means for it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch

from outrider.actors.drafting import DraftSession, LocalDraftSession
from outrider.actors.runner import TreeQuery
from outrider.speculation.errors import ModelError
from outrider.speculation.pipelines.actions import Grow, Verify, Wait
from outrider.speculation.request import Request, StepOutput
from outrider.speculation.sampling import NO_TOKEN, LogitProcessor, TokenChooser, row_positions
from outrider.speculation.statistics import SpeculationStatistics
from outrider.speculation.stopping import StopChecker, ending_ids
from outrider.speculation.tree import ROOT, DraftTree
from outrider.speculation.types import FloatArray, IntArray, Verdict

if TYPE_CHECKING:
    from outrider.actors.target_engine import TargetEngine


class Pipeline(Protocol):
    """One request's decisions; see ``speculation/pipelines``."""

    def decide(self, draft: DraftSession, now: float) -> Grow | Wait | Verify:
        """The next action; asked again after each one but ``Verify``."""
        ...

    def observe_growth(self, rows: int, seconds: float) -> None:
        """What a ``Grow`` took."""
        ...

    def observe_verdict(self, verdict: Verdict, parents_with_children: int, expected: float) -> None:
        """What a verification brought."""
        ...


class RequestRun:
    """Its text, its KV and its drafting. ``close`` frees them, whether it has finished or not."""

    def __init__(self, engine: "TargetEngine", request: Request) -> None:
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
        self._pipeline: Pipeline = engine.make_pipeline(request)
        self.stats = SpeculationStatistics()
        self.finished = False
        self.error: ModelError | None = None
        """Why the request ended without a finish reason."""
        self._length = len(request.prompt_ids)
        self._root = int(request.prompt_ids[-1])
        self._limit = min(self._length + params.max_tokens, self._max_model_len)
        self._sequence = target.runner.open(self._limit + engine.shape.num_speculative_tokens + 1)
        self._draft: DraftSession | None = None
        try:
            if engine.drafting is not None and request.speculative:
                self._draft = engine.drafting.open(request, self.stats)
            began = engine.clock()
            target.runner.prefill(self._sequence, request.prompt_ids[:-1])
            self.stats.prefill_seconds = engine.clock() - began
        except BaseException:
            self.close()
            raise

    def step(self) -> StepOutput:
        """A step of this request alone; see ``TargetEngine.step``.

        Raises:
            ModelError: the target gave no token.
        """
        (output,) = self._engine.step([self])
        if self.error is not None:
            raise self.error
        return output

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

    def decide(self, clock: Callable[[], float]) -> Wait | Verify:
        """What its pipeline wants next; a drafter in this process grows meanwhile."""
        draft = self._draft
        # The last token is the target's own whatever is drafted.
        if draft is None or self._length + 1 >= self._limit:
            return Verify(0)
        while isinstance(action := self._pipeline.decide(draft, clock()), Grow):
            began = clock()
            rows = cast(LocalDraftSession, draft).grow(action.width)
            seconds = clock() - began
            self._pipeline.observe_growth(rows, seconds)
            self.stats.draft_steps += 1
            self.stats.draft_rows += rows
            self.stats.draft_seconds += seconds
        return action

    def best_scores(self, budget: int) -> FloatArray:
        """Path scores of the ``budget`` best nodes, best first."""
        if not budget or self._draft is None:
            return np.zeros(0)
        tree = self._draft.tree
        return -np.sort(-tree.path_scores[tree.slots])[:budget]

    def select(self, budget: int) -> DraftTree:
        """The ``budget`` best nodes."""
        if not budget or self._draft is None:
            return DraftTree.empty()
        tree, _ = self._draft.tree.select(budget)
        return tree

    def query(self, tree: DraftTree) -> TreeQuery:  # type: ignore[type-arg]
        """What the request contributes to a forward."""
        return TreeQuery(sequence=self._sequence, root=self._root, tree=tree)

    def judge(self, tree: DraftTree, logits: torch.Tensor) -> Verdict:
        """Chooses the target's own tokens at every row, and follows them down the tree."""
        processed = self._processor.process(logits, tree)
        tokens = self._chooser.choose(processed, row_positions(self._length, tree))
        return self._engine.verifier.verify(tree, tokens)

    def observe(self, tree: DraftTree, verdict: Verdict, seconds: float) -> None:
        """Counts a step, of which this request's share took so long."""
        self.stats.target_steps += 1
        self.stats.target_rows += len(tree) + 1
        self.stats.target_seconds += seconds
        if self._draft is not None:
            self.stats.record_verification(
                num_draft_tokens=len(tree),
                num_accepted_tokens=verdict.num_accepted_tokens,
                drafter=self._draft.name,
            )
            with_children = np.isin(np.append(verdict.accepted, ROOT), tree.parent_indices)
            self._pipeline.observe_verdict(verdict, int(with_children.sum()), float(tree.scores.sum()))

    def commit(self, tree: DraftTree, verdict: Verdict) -> StepOutput:
        """Makes the accepted path and the target's token part of the text."""
        if verdict.token == NO_TOKEN:
            return self._fail(self._length + verdict.num_accepted_tokens)
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

    def _fail(self, position: int) -> StepOutput:
        message = f"the model gave NaN or infinite logits for the token at position {position}"
        self.finished, self.error = True, ModelError(message)
        return StepOutput(token_ids=[], num_accepted=0, text="")

    def _reroot(self, tokens: IntArray) -> None:
        if self._draft is not None:
            had_tree = len(self._draft.tree) > 0
            survived = self._draft.commit(tokens).survived
            self.stats.reroot_hits += had_tree and survived
            self.stats.reroot_misses += had_tree and not survived
