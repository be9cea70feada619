"""A draft engine for many sessions at once, over a table."""

from collections.abc import Sequence

import numpy as np
import torch

from instruments.table_lm import TableLM
from outrider.actors.virtual import BusyTime
from outrider.kernels.guesses import perturbed
from outrider.speculation.living_tree import LivingTree, Reroot
from outrider.speculation.sampling import TokenChooser, streams_of
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.tree import ROOT, Law
from outrider.speculation.types import IntArray


def relative(lm: TableLM, agreement: float, seed: int = 0) -> TableLM:
    """A drafter's table: rows are the target's own with this chance, others are made up."""
    rng = np.random.default_rng(seed)
    same = rng.random(lm.logits.shape[:-1]) < agreement
    return TableLM(np.where(same[..., None], lm.logits, rng.normal(0.0, 1.5, lm.logits.shape)))


class TableDraftSession:
    """A tree below a text, grown as a draft model grows it."""

    def __init__(
        self, engine: "TableDraftEngine", token_ids: IntArray, chooser: TokenChooser, children: int
    ) -> None:
        self.tree = LivingTree(Law.COUPLED, engine.capacity)
        self.text = token_ids.tolist()
        self.closed = False
        self._engine, self._chooser, self._children = engine, chooser, children

    @property
    def root_rows(self) -> int:
        return int(self.tree.frontier(1).tolist() == [ROOT])

    def commit(self, tokens: IntArray) -> Reroot:
        self.text += tokens.tolist()
        reroot = self.tree.reroot(tokens)
        if not len(self.tree):
            self.tree.clear()
        return reroot

    def expand(self, slots: IntArray) -> None:
        """The likeliest children of each slot, in the order of the target's own noise."""
        paths = [self._path(slot) for slot in slots.tolist()]
        lm, skip = self._engine.lm, self._engine.skip
        logits = torch.from_numpy(np.stack([lm.row(self.text + path) for path in paths]))
        positions = np.array([len(self.text) + len(path) for path in paths])
        chances = perturbed(logits, streams_of([self._chooser], [positions]))
        most = min(self._children + skip, lm.vocab_size)
        best, tokens = chances.topk(most, dim=1)
        scores = (best / chances.sum(dim=1, keepdim=True)).numpy()[:, skip:]
        self.tree.mark_expanded(slots)
        self.tree.add(
            np.repeat(slots, most - skip), tokens.numpy()[:, skip:].reshape(-1), scores.clip(0, 1).reshape(-1)
        )

    def close(self) -> None:
        self.closed = True

    def _path(self, slot: int) -> list[int]:
        path: list[int] = []
        while slot != ROOT:
            path.append(int(self.tree.tokens[slot]))
            slot = int(self.tree.parents[slot])
        return path[::-1]


class TableDraftEngine:
    """A ``BatchDraftEngine`` over a table.

    skip: leaves out so many of the best guesses; with the target's own table and 1, it is
    always wrong. capacity: nodes of a tree. seconds: of a draft step, from now on.
    """

    max_rows = 64

    def __init__(
        self, lm: TableLM, busy: BusyTime, seconds: float, *, skip: int = 0, capacity: int = 256
    ) -> None:
        self.lm, self.skip, self.capacity = lm, skip, capacity
        self._busy, self.seconds = busy, seconds
        self.sessions: list[TableDraftSession] = []

    def open_session(
        self,
        token_ids: IntArray,
        prompt_length: int,  # noqa: ARG002
        params: SamplingParams,
        *,
        choice: int,
        children: int,
        eos_ids: tuple[int, ...],  # noqa: ARG002
    ) -> TableDraftSession:
        self.sessions.append(TableDraftSession(self, token_ids, TokenChooser(params, choice), children))
        return self.sessions[-1]

    def grow(self, plan: Sequence[tuple[TableDraftSession, IntArray]]) -> None:
        self._busy.spend(self.seconds)
        for session, slots in plan:
            session.expand(slots)
