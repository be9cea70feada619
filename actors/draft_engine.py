"""The draft side of a draft model: grows living trees with it, many in one forward.

A session's KV follows its tree: the node in tree slot s keeps its entry in arena slot s, a
re-root moves the entries of the committed path into place and leaves the survivors' where
they are.
"""

from collections.abc import Sequence

import numpy as np
import torch

from outrider.actors.model_runner import ModelRunner
from outrider.kernels.guesses import guesses
from outrider.models.batch import Rows, text_rows
from outrider.models.block_pool import BLOCK, blocks_for
from outrider.models.kv_cache import KVSequence, NodeArena
from outrider.models.numerics import MAX_ROWS, MAX_TAIL
from outrider.speculation.calibration import LOWEST_SCORE, RankCalibration, TextCredit
from outrider.speculation.errors import OutOfBlocksError
from outrider.speculation.growth import Growable, choose_frontiers
from outrider.speculation.living_tree import LivingTree, Reroot
from outrider.speculation.request import Request
from outrider.speculation.sampling import LogitProcessor, TokenChooser, streams_of
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.statistics import SpeculationStatistics
from outrider.speculation.stopping import ending_ids
from outrider.speculation.tree import ROOT, DraftTree, Law
from outrider.speculation.types import FloatArray, IntArray

TREE_CAPACITY = MAX_TAIL
"""Nodes that a draft tree holds, and KV entries that a session keeps for them."""

MIN_SCORE = 0.003
"""Children less likely than this, given their parent, are not worth a place in the tree."""


def session_blocks(max_tokens: int) -> int:
    """Blocks that a session of up to ``max_tokens`` tokens holds."""
    return blocks_for(max_tokens) + blocks_for(TREE_CAPACITY)


class ModelDraftEngine:
    """Drafts with a draft model that shares the target's vocabulary, for any number of sessions.

    vocab_size: real tokens; the model's head may be padded beyond them.
    """

    max_rows = MAX_ROWS

    def __init__(self, runner: ModelRunner, *, vocab_size: int) -> None:
        self.runner, self.vocab_size = runner, vocab_size
        self.calibration = RankCalibration()

    def open_session(
        self,
        token_ids: IntArray,
        prompt_length: int,
        params: SamplingParams,
        *,
        choice: int,
        children: int,
        eos_ids: tuple[int, ...],
    ) -> "ModelDraftSession":
        """A session behind ``token_ids`` (int64 ``[length]``), of which the prompt is a part.

        Raises:
            InvalidRequestError: a parameter does not fit the vocabulary.
            OutOfBlocksError: the KV cache has no room.
        """
        prompt_ids, output = token_ids[:prompt_length], token_ids[prompt_length:]
        stop_ids, device = ending_ids(params, eos_ids), self.runner.decoder.device
        processor = LogitProcessor(params, prompt_ids, self.vocab_size, stop_ids, device)
        processor.commit(output)
        room = min(self.runner.max_model_len, len(token_ids) + params.max_tokens)
        return ModelDraftSession(self, token_ids, processor, TokenChooser(params, choice), children, room)

    @torch.inference_mode()
    def grow(self, plan: Sequence[tuple["ModelDraftSession", IntArray]]) -> None:
        """Expands these slots of these sessions (``ROOT`` alone, or nodes) in one forward.

        A text longer than what is left of a forward goes in pieces: its root stays unexpanded.
        """
        plan = [(session, slots) for session, slots in plan if session.fits(slots)]
        if not plan:
            return
        room = self.max_rows - sum(len(slots) for session, slots in plan if not session.root_rows)
        parts = []
        for session, slots in plan:
            parts.append(session.rows(slots, room))
            room -= len(parts[-1].tokens) if session.root_rows else 0
        logits = self.runner.forward(parts)
        counts = [len(part.tokens) - part.first_logit_row for part in parts]
        ready = [
            (session, slots, each)
            for (session, slots), part, each in zip(plan, parts, torch.split(logits, counts), strict=True)
            if session.computed(part, slots) and len(each)
        ]
        if ready:
            self._add_children(ready)

    def _add_children(self, ready: Sequence[tuple["ModelDraftSession", IntArray, torch.Tensor]]) -> None:
        """Gives each node its likeliest children, in the order of this very draw's noise."""
        processed = _joined([session.process(slots, logits) for session, slots, logits in ready])
        choosers = [session.chooser for session, _, _ in ready]
        positions = [session.child_positions(slots) for session, slots, _ in ready]
        most = max(session.children for session, _, _ in ready)
        ids, scores = guesses(processed, streams_of(choosers, positions), most)
        start = 0
        for session, slots, _ in ready:
            rows = slice(start, start + len(slots))
            session.add_children(slots, ids[rows, : session.children], scores[rows, : session.children])
            start += len(slots)


class LocalModelDrafting:
    """Drafts in the target's own process; a ``DraftEngine``.

    eos_ids: tokens that end a text, which ``min_tokens`` holds back.
    """

    def __init__(self, engine: ModelDraftEngine, *, children: int, eos_ids: tuple[int, ...]) -> None:
        self._engine, self._children, self._eos_ids = engine, children, eos_ids

    def open(self, request: Request, stats: SpeculationStatistics) -> "ModelDraftSession":  # noqa: ARG002
        """See ``DraftEngine``."""
        return self._engine.open_session(
            request.prompt_ids,
            len(request.prompt_ids),
            request.params,
            choice=request.choice,
            children=self._children,
            eos_ids=self._eos_ids,
        )

    def grow(self, sessions: Sequence["ModelDraftSession"], width: int) -> list[int]:
        """See ``LocalDraftEngine``; a long text goes in pieces, one a step."""
        growable = [
            Growable(tree=each.tree, width=width, min_score=0.0, root_rows=each.root_rows)
            for each in sessions
        ]
        most = self._engine.max_rows
        frontiers = choose_frontiers(growable, max_nodes=most, max_rows=most)
        rows = [
            min(most, session.root_rows) or len(slots) if len(slots) else 0
            for session, slots in zip(sessions, frontiers, strict=True)
        ]
        plan = zip(sessions, frontiers, strict=True)
        self._engine.grow([(session, slots) for session, slots in plan if len(slots)])
        return rows


class ModelDraftSession:
    """One request's tree, its KV and what the drafter expects of it."""

    def __init__(
        self,
        engine: ModelDraftEngine,
        token_ids: IntArray,
        processor: LogitProcessor,
        chooser: TokenChooser,
        children: int,
        max_tokens: int,
    ) -> None:
        self.chooser, self.children = chooser, children
        self.tree = LivingTree(Law.COUPLED, TREE_CAPACITY)
        self._engine, self._processor = engine, processor
        self._sequence, self._nodes = _room(engine.runner, token_ids, max_tokens)
        self._max_tokens = max_tokens
        self._unpublished = token_ids
        """The text at the beginning, until it is cached as a whole."""
        self._uncached = token_ids[self._sequence.length :]
        """Committed tokens without KV; the last one is the root, unless it is cached already."""
        self._cached = np.zeros(TREE_CAPACITY, np.bool_)
        self._ranks = np.zeros(TREE_CAPACITY, np.int64)
        self._raw_scores = np.zeros(TREE_CAPACITY)
        self._corrected = np.zeros(TREE_CAPACITY)
        self._credit = TextCredit()

    @property
    def root_rows(self) -> int:
        """Rows that expanding the root takes; 0 when it is expanded."""
        return len(self._uncached)

    def proposers(self, slots: IntArray) -> dict[str, int]:
        return {"draft_model": len(slots)}

    def commit(self, tokens: IntArray) -> Reroot:
        tree = self.tree
        if tree.is_bare:
            self._uncached = np.concatenate((self._uncached, tokens))
            self._processor.commit(tokens)
            return tree.reroot(tokens)
        live = tree.slots
        parents = tree.parents[live]
        root_cached = not len(self._uncached)
        reroot = tree.reroot(tokens)
        self._learn(live, parents, reroot)
        room = self._max_tokens - self._sequence.length
        cached = reroot.path_slots[self._cached[reroot.path_slots]][:room] if root_cached else tokens[:0]
        self._sequence.keep(self._nodes.slots[cached])
        self._uncached = np.concatenate((self._uncached, tokens[len(cached) :]))
        if not len(self._uncached) and not len(tree):
            # All children of the new root were pushed out; it has to be expanded again.
            tree.clear()
            self._sequence.length -= 1
            self._uncached = tokens[-1:]
        self._processor.commit(tokens)
        return reroot

    def close(self) -> None:
        self._sequence.close()
        self._nodes.close()

    def rows(self, slots: IntArray, room: int) -> Rows:
        """What expanding these slots computes; of a long text, as much as there is room for."""
        if slots[0] != ROOT:
            return self._node_rows(slots)
        count = min(room, len(self._uncached))
        wanted = count - 1 if count == len(self._uncached) else count
        return text_rows(self._sequence, self._uncached[:count], first_logit_row=wanted)

    def computed(self, rows: Rows, slots: IntArray) -> bool:
        """Notes what has KV now; whether the slots' own rows were among it."""
        if slots[0] != ROOT:
            self._cached[slots] = True
            return True
        self._sequence.length += len(rows.tokens)
        self._uncached = self._uncached[len(rows.tokens) :]
        if len(self._uncached):
            return False
        if len(self._unpublished):
            self._sequence.publish(self._unpublished)
            self._unpublished = self._uncached
        return True

    def child_positions(self, slots: IntArray) -> IntArray:
        """Where in the text the children of these slots stand."""
        positions: IntArray = self._sequence.length + np.where(slots == ROOT, 0, self.tree.depths[slots])
        return positions

    def process(self, slots: IntArray, logits: torch.Tensor) -> torch.Tensor:
        """Applies the request's sampling parameters along each node's path; may be a view of the logits."""
        if self._processor.is_trivial:
            return logits[:, : self._engine.vocab_size]
        if slots[0] == ROOT or not self._processor.depends_on_path:
            return self._processor.process(logits, DraftTree.empty(), np.zeros(len(slots), np.int64))
        nodes = np.unique(self._ancestors(slots))
        nodes = nodes[nodes != ROOT]
        nodes = nodes[np.argsort(self.tree.depths[nodes], kind="stable")]
        index = np.full(TREE_CAPACITY + 1, ROOT, np.int64)
        index[nodes] = np.arange(len(nodes))
        tree = DraftTree(
            tokens=self.tree.tokens[nodes],
            parent_indices=index[self.tree.parents[nodes]],
            scores=self.tree.path_scores[nodes],
            law=self.tree.law,
        )
        return self._processor.process(logits, tree, index[slots] + 1)

    def add_children(self, slots: IntArray, tokens: IntArray, scores: FloatArray) -> None:
        """Adds the likely ones of ``[slots, children]`` tokens with conditional scores, best first."""
        rows, ranks = (scores >= MIN_SCORE).nonzero()
        raw = scores[rows, ranks]
        corrected = self._engine.calibration.correct(ranks, raw)
        # First: children may take the slots of nodes that they push out.
        self.tree.mark_expanded(slots)
        credited = np.clip(self._credit.factor * corrected, LOWEST_SCORE, 1.0)
        added = self.tree.add(slots[rows], tokens[rows, ranks], credited)
        placed = added >= 0
        children = added[placed]
        self._cached[children] = False
        self._ranks[children] = ranks[placed]
        self._raw_scores[children] = raw[placed]
        self._corrected[children] = corrected[placed]

    def fits(self, slots: IntArray) -> bool:
        """Whether the session's room, which the draft model's own context bounds, lasts below these slots.

        Where it has not, they get no children.
        """
        deepest = 0 if slots[0] == ROOT else int(self.tree.depths[slots].max())
        if self._sequence.length + len(self._uncached) + deepest <= self._max_tokens:
            return True
        self.tree.mark_expanded(slots)
        return False

    def _node_rows(self, frontier: IntArray) -> Rows:
        """The frontier nodes, each seeing the committed text and its own ancestors."""
        tree, sequence = self.tree, self._sequence
        return Rows(
            tokens=tree.tokens[frontier],
            positions=sequence.length - 1 + tree.depths[frontier],
            slots=self._nodes.slots[frontier],
            committed=sequence.length,
            nodes=frontier,
            node_parents=tree.parents,
            node_depths=tree.depths,
            node_slots=self._nodes.slots[: tree.capacity],
            table=sequence.table,
            first_logit_row=0,
        )

    def _ancestors(self, frontier: IntArray) -> IntArray:
        """Slots int64 ``[frontier, depth]`` from each node upwards, filled with ``ROOT``."""
        levels = [frontier]
        while (above := np.where(levels[-1] == ROOT, ROOT, self.tree.parents[levels[-1]])).max() != ROOT:
            levels.append(above)
        return np.stack(levels, axis=1)

    def _learn(self, live: IntArray, parents: IntArray, reroot: Reroot) -> None:
        """Compares the children of the root and of the accepted path with what was committed."""
        path = reroot.path_slots
        judged = np.append(path[:-1] if reroot.survived else path, ROOT)
        offered = np.isin(parents, judged)
        slots = live[offered]
        right = np.isin(slots, path)
        self._engine.calibration.observe(self._ranks[slots], self._raw_scores[slots], right)
        expected = float(self._corrected[slots].sum())
        self._credit.observe(len(judged), hits=int(right.sum()), expected=expected)


def _joined(rows: list[torch.Tensor]) -> torch.Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _room(runner: ModelRunner, token_ids: IntArray, max_tokens: int) -> tuple[KVSequence, NodeArena]:
    """Room for a text, beginning with what is cached of it, and for a tree's nodes."""
    nodes = NodeArena(runner.cache, TREE_CAPACITY)
    sequence = KVSequence(runner.cache)
    sequence.adopt(token_ids[:-1])
    if not sequence.reserve(max_tokens):
        sequence.close()
        nodes.close()
        raise OutOfBlocksError(
            f"{max_tokens} tokens do not fit the KV cache: "
            f"{runner.cache.blocks.num_free} blocks of {BLOCK} are free"
        )
    return sequence, nodes
