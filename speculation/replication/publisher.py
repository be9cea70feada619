"""The drafter's end of one generation: what grew becomes messages, commits become known."""

from dataclasses import replace

import numpy as np

from outrider.speculation.living_tree import LivingTree
from outrider.speculation.replication.messages import MAX_GROWTH_NODES, ROOT_ID, Commit, Growth, Open
from outrider.speculation.replication.replica import GapError
from outrider.speculation.replication.text import CommittedText, hash_behind
from outrider.speculation.tree import ROOT
from outrider.speculation.types import IntArray


class Publisher:
    """Numbers the nodes of one session's tree in the order in which they grew."""

    def __init__(self, opening: Open, tree: LivingTree) -> None:
        self.session, self.generation = opening.session, opening.generation
        self.text = CommittedText(opening.token_ids)
        self.seen_commit = 0
        self._tree = tree
        self._ids = np.zeros(tree.capacity, np.int64)
        self._next_id = ROOT_ID + 1
        self._last_birth = -1

    def accepts(self, commit: Commit) -> bool:
        """Takes a commit's tokens into the text; False for one that is known already.

        Raises:
            GapError: an earlier commit is missing, or the texts have come apart.
        """
        if commit.sequence <= self.seen_commit:
            return False
        if commit.sequence != self.seen_commit + 1:
            raise GapError(f"commit {commit.sequence} came after {self.seen_commit}")
        if commit.base_length != self.text.length:
            raise GapError(f"a commit behind {commit.base_length} tokens, not {self.text.length}")
        if hash_behind(self.text.prefix_hash, commit.tokens) != commit.prefix_hash:
            raise GapError(f"the text of {self.text.length} tokens is not the target's")
        self.text.append(commit.tokens)
        self.seen_commit = commit.sequence
        return True

    def publish(
        self, *, final: bool, draft_steps: int, draft_rows: int, draft_seconds: float, sent_at: float
    ) -> list[Growth]:
        """All nodes that grew since the last call and are still there, as one message or more.

        The arguments are those of ``Growth``; the last message has them.
        """
        tree = self._tree
        live = tree.slots
        fresh = live[tree.births[live] > self._last_birth]
        fresh = fresh[np.argsort(tree.births[fresh])]
        if len(fresh):
            self._last_birth = int(tree.births[fresh[-1]])
        starts = range(0, max(1, len(fresh)), MAX_GROWTH_NODES)
        growths = [self._growth(fresh[start : start + MAX_GROWTH_NODES], sent_at) for start in starts]
        growths[-1] = replace(
            growths[-1],
            final=final,
            draft_steps=draft_steps,
            draft_rows=draft_rows,
            draft_seconds=draft_seconds,
        )
        return growths

    def _growth(self, slots: IntArray, sent_at: float) -> Growth:
        """Numbers these nodes, the oldest first."""
        tree, first = self._tree, self._next_id
        self._ids[slots] = first + np.arange(len(slots))
        self._next_id += len(slots)
        parents = tree.parents[slots]
        below_root = parents == ROOT
        above = np.where(below_root, 1.0, tree.path_scores[parents])
        return Growth(
            session=self.session,
            generation=self.generation,
            seen_commit=self.seen_commit,
            base_length=self.text.length,
            first_id=first,
            parents=np.where(below_root, ROOT_ID, self._ids[parents]),
            tokens=tree.tokens[slots],
            scores=np.minimum(tree.path_scores[slots] / above, 1.0).astype(np.float32),
            sent_at=sent_at,
        )
