"""One request in flight at the target: what it wants verified, and what a verdict means for it."""

import logging
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from outrider.actors.drafting import DraftSession, LocalDraftEngine
from outrider.actors.remote_session import RemoteSession
from outrider.actors.runner import TreeQuery
from outrider.speculation.errors import InvalidRequestError, ModelError, OutOfBlocksError
from outrider.speculation.logprobs import LogprobLog
from outrider.speculation.pipelines.actions import Choice, Linger, Verify, Wait
from outrider.speculation.request import Request, StepOutput
from outrider.speculation.sampling import NO_TOKEN, LogitProcessor, TokenChooser, row_positions
from outrider.speculation.statistics import SpeculationStatistics
from outrider.speculation.stopping import StopChecker, ending_ids
from outrider.speculation.tree import ROOT, DraftTree
from outrider.speculation.types import FloatArray, IntArray, Verdict

if TYPE_CHECKING:
    from outrider.actors.target_engine import TargetEngine

log = logging.getLogger(__name__)

_NO_NODES: IntArray = np.zeros(0, np.int64)


class Pipeline(Protocol):
    """One request's decisions with a drafter in another process; see ``speculation/pipelines``."""

    def decide(self, draft: Any, now: float) -> Wait | Linger | Verify:
        """The next action; asked again whenever the step was held back."""
        ...


class RequestRun:
    """Its text, its KV and its drafting. ``close`` frees them, whether it has finished or not.

    It has KV from ``enter`` to ``leave`` and may enter again. ``start`` gives one that has not
    entered; ``step`` lets it in by itself.
    """

    def __init__(self, engine: "TargetEngine", request: Request) -> None:
        self._engine, self.request, target = engine, request, engine.target
        _require_known(request.prediction_ids, target.vocab_size)
        params = request.params
        max_model_len = target.runner.max_model_len
        self._stop = StopChecker(
            params, target.eos_ids, len(request.prompt_ids), max_model_len, target.detokenizer(request)
        )
        self.processor = LogitProcessor(
            params,
            request.prompt_ids,
            target.vocab_size,
            ending_ids(params, target.eos_ids),
            target.device,
        )
        self.chooser = TokenChooser(params, request.choice)
        self.logprobs = LogprobLog(params, request.prompt_ids)
        self._pipeline = engine.make_pipeline(request)
        self.stats = SpeculationStatistics()
        self.finished = False
        self.error: ModelError | None = None
        """Why the request ended without a finish reason."""
        self._length = len(request.prompt_ids)
        self._limit = min(self._length + params.max_tokens, max_model_len)
        self._tokens = np.empty(self._limit, np.int64)
        self._tokens[: self._length] = request.prompt_ids
        self._sequence: Any = None
        self._draft: DraftSession | None = None
        self._told = self._length
        """Tokens of the text that its drafting knows of."""
        self._selected = _NO_NODES
        asked = request.num_speculative_tokens
        self._most_nodes = engine.shape.num_speculative_tokens if asked is None else asked
        self._speculates = (
            request.speculative and self._most_nodes > 0 and engine.drafting_of(request) is not None
        )
        self._is_to_open = self._speculates
        """Whether drafting for it has yet to be opened."""
        self.is_predicted = self._speculates and request.prediction_ids is not None
        """Whether the caller's prediction drafts for it."""
        self._drafts_here = not self.is_predicted and isinstance(engine.drafting, LocalDraftEngine)
        self._is_off = False

    @property
    def committed(self) -> IntArray:
        """The text so far, int64 ``[length]``."""
        return self._tokens[: self._length]

    @property
    def num_cached(self) -> int:
        """Tokens of it that have KV."""
        return 0 if self._sequence is None else int(self._sequence.length)

    @property
    def num_pending(self) -> int:
        """Tokens of it that have none, at least the last one."""
        return self._length - self.num_cached

    @property
    def num_reusable(self) -> int:
        """First tokens of it whose KV another may have computed; the rows of the others have to be run."""
        first_row = self.logprobs.first_row
        return self._length - 1 if first_row is None else first_row

    def enter(self, like: "tuple[RequestRun, int] | None" = None) -> bool:
        """Takes memory for the text, beginning with so many tokens of another's; False: there is none.

        Raises:
            OutriderError: its drafter cannot serve it.
        """
        shared = None if like is None else (like[0]._sequence, like[1])
        sequence = self._engine.target.runner.open(self.committed, shared, self.num_reusable)
        if sequence is None:
            return False
        self._sequence = sequence
        self.stats.cached_tokens += sequence.length
        if not self._drafts_here:
            self.open_draft()
        return True

    def leave(self) -> None:
        """Gives the KV back; the text stays, and with it all that is needed to go on."""
        self._sequence.close()
        self._sequence = None
        self.stats.preemptions += 1

    def make_room(self) -> bool:
        """Takes memory for the tokens that the next step caches; False: there is none."""
        return bool(self._sequence.reserve(self._length))

    def step(self) -> StepOutput:
        """A step of this request alone that brings it tokens; see ``TargetEngine.step``.

        Raises:
            ModelError: the target gave no token.
            OutOfBlocksError: the KV cache has no room for the text.
        """
        while True:
            if not (self.enter() if self._sequence is None else self.make_room()):
                raise OutOfBlocksError(f"a text of {self._length} tokens does not fit the KV cache")
            (output,) = self._engine.step([self])
            if self.error is not None:
                raise self.error
            if output is not None:
                return output

    def close(self) -> None:
        """Frees what the request holds."""
        self.finished = True
        if self._sequence is not None:
            self._sequence.close()
            self._sequence = None
        if self._draft is not None:
            self._draft.close()
            self._draft = None

    def __enter__(self) -> "RequestRun":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def text(self) -> str:
        """The output so far."""
        return self._stop.text

    @property
    def draft(self) -> DraftSession | None:
        """Its drafting, where it can help with the step to come."""
        # The last token is the target's own whatever is drafted.
        return None if self._length + 1 >= self._limit else self._draft

    def decide(self, now: float) -> Wait | Linger | Verify:
        """What its pipeline wants next."""
        draft = self.draft
        return Verify(0) if draft is None else self._pipeline.decide(draft, now)

    @property
    def is_drafted_for(self) -> bool:
        """Whether somebody in another process drafts for it."""
        return isinstance(self._draft, RemoteSession) and self._draft.reachable

    def observe_choice(self, choice: Choice) -> None:
        """Counts a step that drafters in other processes might have helped with."""
        if not isinstance(self._draft, RemoteSession):
            return
        if not self._draft.reachable:
            choice = Choice.NO_DRAFTER
        counts, off = self.stats.steps_by_choice, choice == Choice.OFF
        counts[choice.value] = counts.get(choice.value, 0) + 1
        self.stats.drafting_switches += off != self._is_off
        self._is_off = off

    def observe_growth(self, rows: int, seconds: float) -> None:
        """Counts a draft step in this process, of which this request's share took so long."""
        self.stats.draft_steps += 1
        self.stats.draft_rows += rows
        self.stats.draft_seconds += seconds

    def open_draft(self) -> None:
        """Opens its drafting, once; without room at the drafter the request is decoded plainly.

        In this process that is done when drafting first may pay: many requests are over by then.

        Raises:
            OutriderError: its drafter cannot serve it.
        """
        if not self._is_to_open:
            return
        self._is_to_open = False
        drafting = self._engine.drafting_of(self.request)
        assert drafting is not None
        try:
            self._draft = drafting.open(self.request, self.stats)
        except OutOfBlocksError as error:
            log.info("request %s: not drafted for: %s", self.request.request_id, error)

    def tell_draft(self) -> None:
        """Tells its drafting what it does not know of the text yet."""
        assert self._draft is not None
        if self._told == self._length:
            return
        tokens, self._told = self._tokens[self._told : self._length], self._length
        had_tree = len(self._draft.tree) > 0
        survived = self._draft.commit(tokens).survived
        self.stats.reroot_hits += had_tree and survived
        self.stats.reroot_misses += had_tree and not survived

    def best_scores(self, budget: int) -> FloatArray:
        """Path scores of the ``budget`` best nodes, best first."""
        budget = min(budget, self._most_nodes)
        if not budget or self._draft is None:
            return np.zeros(0)
        tree = self._draft.tree
        return -np.sort(-tree.path_scores[tree.slots])[:budget]

    def select(self, budget: int) -> DraftTree:
        """The ``budget`` best nodes, or as many as the request allows and there is memory for."""
        budget = min(budget, self._most_nodes)
        if not budget or self._draft is None:
            self._selected = _NO_NODES
            return DraftTree.empty()
        if not self._sequence.reserve(self._length + budget):
            budget = min(budget, self._sequence.room - self._length)
        tree, self._selected = self._draft.tree.select(budget)
        return tree

    def query(self, count: int, tree: DraftTree | None) -> TreeQuery[Any]:
        """What the request contributes to a forward: so many pending tokens, then a tree."""
        start, stop = self.num_cached, self.num_cached + count
        return TreeQuery(
            sequence=self._sequence,
            tokens=self._tokens[start:stop],
            tree=tree,
            text_logits=self.logprobs.num_text_rows(start, stop - (tree is not None)),
        )

    def positions(self, tree: DraftTree) -> IntArray:
        """int64 ``[1 + nodes]``, of the tokens that the root's and the nodes' rows choose."""
        return row_positions(self._length, tree)

    def observe_prefill(self, seconds: float) -> None:
        """Counts a step that only cached some of the text."""
        self.stats.prefill_seconds += seconds
        self._sequence.publish(self.committed)

    def observe(self, tree: DraftTree, verdict: Verdict, seconds: float) -> None:
        """Counts a step, of which this request's share took so long."""
        self.stats.target_steps += 1
        self.stats.target_rows += len(tree) + 1
        self.stats.target_seconds += seconds
        if self._speculates:
            accepted = self._selected[verdict.accepted]
            self.stats.record_verification(
                num_draft_tokens=len(tree),
                num_accepted_tokens=len(accepted),
                proposers={} if self._draft is None else self._draft.proposers(accepted),
            )
            if self.is_predicted:
                self.stats.accepted_prediction_tokens += verdict.num_accepted_tokens
                self.stats.rejected_prediction_tokens += len(tree) - verdict.num_accepted_tokens
            else:
                self._learn(tree, verdict)

    def commit(self, tree: DraftTree, verdict: Verdict) -> StepOutput:
        """Makes the accepted path and the target's token part of the text."""
        if verdict.token == NO_TOKEN:
            return self._fail(self._length + verdict.num_accepted_tokens)
        self._engine.target.runner.accept(self._sequence, verdict.accepted)
        drafted = tree.tokens[verdict.accepted].tolist()
        tokens = [*drafted, verdict.token]
        outcome = self._stop.push(tokens)
        kept = tokens[: outcome.num_kept]
        first = self.stats.num_output_tokens == 0
        self.finished = outcome.finish_reason is not None
        start, self._length = self._length, self._length + len(kept)
        self._tokens[start : self._length] = kept
        self._sequence.publish(self.committed)
        self.stats.num_output_tokens += len(kept)
        if not self.finished:
            self.processor.commit(self._tokens[start : self._length])
            # In this process a drafter that rests hears of it when it is to draft again.
            if self._draft is not None and not (self._drafts_here and self._draft.tree.is_bare):
                self.tell_draft()
        return StepOutput(
            token_ids=kept,
            num_accepted=min(len(kept), len(drafted)),
            text=self._stop.take_text(),
            finish_reason=outcome.finish_reason,
            stop_reason=outcome.stop_reason,
            logprobs=self.logprobs.commit(len(kept)),
            prompt_logprobs=self.logprobs.prompt if first else None,
        )

    def _learn(self, tree: DraftTree, verdict: Verdict) -> None:
        """Tells the engine's estimates how its drafter fared."""
        hits, costs = verdict.num_accepted_tokens, self._engine.costs
        if len(tree):
            with_children = np.isin(np.append(verdict.accepted, ROOT), tree.parent_indices)
            costs.observe_verdict(hits, int(with_children.sum()), float(tree.scores.sum()))
        else:
            costs.observe_verdict(0, 0, 0.0)

    def _fail(self, position: int) -> StepOutput:
        message = (
            f"no token can be chosen at position {position}: the model gave NaN or infinite logits, "
            "or the request's parameters forbid every token"
        )
        self.finished, self.error = True, ModelError(message)
        return StepOutput(token_ids=[], num_accepted=0, text="")


def _require_known(prediction_ids: IntArray | None, vocab_size: int) -> None:
    if prediction_ids is None:
        return
    for token in prediction_ids[(prediction_ids < 0) | (prediction_ids >= vocab_size)]:
        raise InvalidRequestError(f"prediction token {token} is not in the vocabulary of {vocab_size}")
