"""The draft side of a draft model: grows living trees with it, best nodes first.

A session's KV follows its tree: the node in tree slot s keeps its entry in arena slot s, a
re-root moves the entries of the committed path into place and leaves the survivors' where
they are.
"""

import numpy as np
import torch

from outrider.actors.model_runner import ModelRunner
from outrider.models.batch import Rows, prefill_rows
from outrider.models.numerics import MAX_ROWS, MAX_TAIL
from outrider.speculation.calibration import RankCalibration
from outrider.speculation.living_tree import LivingTree, Reroot
from outrider.speculation.pipelines.serial import TreeShape
from outrider.speculation.request import Request
from outrider.speculation.sampling import LogitProcessor, TokenChooser
from outrider.speculation.stopping import ending_ids
from outrider.speculation.tree import ROOT, DraftTree, Law
from outrider.speculation.types import FloatArray, IntArray

TREE_CAPACITY = MAX_TAIL
"""Nodes that a draft tree holds, and KV entries that a session keeps for them."""
MIN_SCORE = 0.003
"""Children less likely than this, given their parent, are not worth a place in the tree."""


class ModelDraftEngine:
    """Drafts with a draft model that shares the target's vocabulary.

    vocab_size: real tokens; the model's head may be padded beyond them.
    eos_ids: tokens that end a text, which ``min_tokens`` holds back.
    """

    name = "draft_model"

    def __init__(
        self, runner: ModelRunner, *, shape: TreeShape, vocab_size: int, eos_ids: tuple[int, ...]
    ) -> None:
        self.runner, self.shape = runner, shape
        self.vocab_size, self.eos_ids = vocab_size, eos_ids
        self.calibration = RankCalibration()

    def open(self, request: Request) -> "ModelDraftSession":
        return ModelDraftSession(self, request)


class ModelDraftSession:
    """One request's tree, its KV and what the drafter expects of it."""

    def __init__(self, engine: ModelDraftEngine, request: Request) -> None:
        self.name = engine.name
        self._engine, self._runner = engine, engine.runner
        params = request.params
        self._processor = LogitProcessor(
            params, request.prompt_ids, engine.vocab_size, ending_ids(params, engine.eos_ids)
        )
        self._chooser = TokenChooser(params, request.choice)
        self.tree = LivingTree(Law.COUPLED, TREE_CAPACITY)
        self._sequence = engine.runner.open(self._runner.max_model_len)
        self._uncached = request.prompt_ids
        """Committed tokens without KV; the last one is the root, unless it is cached already."""
        self._cached = np.zeros(TREE_CAPACITY, np.bool_)
        self._ranks = np.zeros(TREE_CAPACITY, np.int64)
        self._raw_scores = np.zeros(TREE_CAPACITY)

    def grow(self, width: int) -> int:
        frontier = self.tree.frontier(width)
        if not len(frontier) or self._out_of_context(frontier):
            self.tree.mark_expanded(frontier)
            return 0
        rows = self._root_rows() if frontier[0] == ROOT else self._node_rows(frontier)
        first = len(rows.tokens) - 1 if frontier[0] == ROOT else 0
        logits = self._runner.forward(self._sequence, rows, first_logit_row=first)
        if frontier[0] == ROOT:
            self._sequence.length += len(self._uncached)
            self._uncached = self._uncached[:0]
            frontier = frontier[:1]
        else:
            self._cached[frontier] = True
        self._add_children(frontier, logits)
        return len(rows.tokens)

    def commit(self, tokens: IntArray) -> Reroot:
        tree = self.tree
        live = tree.slots
        parents = tree.parents[live]
        root_cached = not len(self._uncached)
        reroot = tree.reroot(tokens)
        self._learn(live, parents, reroot)
        cached = reroot.path_slots[self._cached[reroot.path_slots]] if root_cached else tokens[:0]
        self._sequence.commit_nodes(cached)
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

    def _out_of_context(self, frontier: IntArray) -> bool:
        """Whether the draft model's own context, which may be shorter, has no room for these nodes."""
        deepest = 0 if frontier[0] == ROOT else int(self.tree.depths[frontier].max())
        return self._sequence.length + len(self._uncached) + deepest > self._runner.max_model_len

    def _root_rows(self) -> Rows:
        """Everything committed that has no KV yet; only the last chunk is left to the caller."""
        last = max(0, len(self._uncached) - 1) // MAX_ROWS * MAX_ROWS
        self._runner.prefill(self._sequence, self._uncached[:last])
        self._uncached = self._uncached[last:]
        return prefill_rows(self._sequence, self._uncached)

    def _node_rows(self, frontier: IntArray) -> Rows:
        """The frontier nodes, each seeing the committed text and its own ancestors."""
        tree, sequence = self.tree, self._sequence
        ancestors = self._ancestors(frontier)
        nodes, columns = np.unique(ancestors[ancestors != ROOT], return_inverse=True)
        paths = np.zeros((len(frontier), len(nodes)), np.bool_)
        paths[np.nonzero(ancestors != ROOT)[0], columns] = True
        root = sequence.length - 1
        return Rows(
            tokens=tree.tokens[frontier],
            positions=root + tree.depths[frontier],
            slots=sequence.node_base + frontier,
            committed=sequence.length,
            paths=paths,
            node_positions=root + tree.depths[nodes],
            node_slots=sequence.node_base + nodes,
        )

    def _ancestors(self, frontier: IntArray) -> IntArray:
        """Slots int64 ``[frontier, depth]`` from each node upwards, filled with ``ROOT``."""
        levels = [frontier]
        while (above := np.where(levels[-1] == ROOT, ROOT, self.tree.parents[levels[-1]])).max() != ROOT:
            levels.append(above)
        return np.stack(levels, axis=1)

    def _add_children(self, frontier: IntArray, logits: torch.Tensor) -> None:
        """Gives each node its likeliest children, in the order of this very draw's noise."""
        tokens, scores = self._guesses(frontier, logits)
        rank = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        wanted = scores >= MIN_SCORE
        corrected = self._engine.calibration.correct(rank[wanted], scores[wanted])
        parents = np.broadcast_to(frontier[:, None], tokens.shape)[wanted]
        # First: children may take the slots of frontier nodes that they push out.
        self.tree.mark_expanded(frontier)
        slots = self.tree.add(parents, tokens[wanted], corrected)
        placed = slots >= 0
        self._cached[slots[placed]] = False
        self._ranks[slots[placed]] = rank[wanted][placed]
        self._raw_scores[slots[placed]] = scores[wanted][placed]

    @torch.inference_mode()
    def _guesses(self, frontier: IntArray, logits: torch.Tensor) -> tuple[IntArray, FloatArray]:
        """Tokens and conditional scores ``[frontier, children]``, best first."""
        length = self._sequence.length
        depths = np.where(frontier == ROOT, 0, self.tree.depths[frontier])
        processed = self._process(frontier, logits)
        perturbed = self._chooser.perturbed(processed, length + depths)
        best, tokens = perturbed.topk(min(self._engine.shape.children, perturbed.shape[1]), dim=1)
        shares = best / perturbed.sum(dim=1, keepdim=True)
        scores = np.nan_to_num(shares.to(torch.float64).numpy(), nan=0.0)
        return tokens.numpy(), np.clip(scores, 0.0, 1.0)

    def _process(self, frontier: IntArray, logits: torch.Tensor) -> torch.Tensor:
        """Applies the request's sampling parameters along each node's path."""
        if frontier[0] == ROOT or not self._processor.depends_on_path:
            return self._processor.process(logits, DraftTree.empty(), np.zeros(len(frontier), np.int64))
        nodes = np.unique(self._ancestors(frontier))
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
        return self._processor.process(logits, tree, index[frontier] + 1)

    def _learn(self, live: IntArray, parents: IntArray, reroot: Reroot) -> None:
        """Compares the children of the root and of the accepted path with what was committed."""
        path = reroot.path_slots
        judged = np.append(path[:-1] if reroot.survived else path, ROOT)
        offered = np.isin(parents, judged)
        slots = live[offered]
        self._engine.calibration.observe(self._ranks[slots], self._raw_scores[slots], np.isin(slots, path))
