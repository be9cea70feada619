"""Rows of several sequences in one forward, against the same rows run alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from forwards import opened

from outrider.actors.model_runner import ModelRunner
from outrider.models.batch import Rows, text_rows, tree_rows
from outrider.models.kv_cache import TRASH_SLOT, KVSequence
from outrider.models.numerics import MAX_ROWS
from outrider.speculation.tree import ROOT, DraftTree, Law
from outrider.speculation.types import IntArray

VOCAB = 300
LENGTHS = (0, 33, 64, 31, 150, 63, 32, 65, 95, 230, 1, 127, 96)
"""Cached tokens: around the ends of blocks, of prefixes and of their tails, and far beyond."""
MAX_SEQUENCES = 8
KINDS = ("bushy", "chunk", "chain", "lone root")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one sequence does in a forward.

    cached: tokens ``[length]`` that stand before. tokens: those of the rows.
    tree: the nodes below ``tokens[0]``, or None: the rows are a chunk of a prompt.
    first_logit_row: as in ``Rows``; 0 for trees.
    accepted: nodes that become part of the text.
    """

    cached: IntArray
    tokens: IntArray
    tree: DraftTree | None
    first_logit_row: int
    accepted: IntArray

    def rows(self, sequence: KVSequence) -> Rows:
        if self.tree is None:
            return text_rows(sequence, self.tokens, first_logit_row=self.first_logit_row)
        tree = self.tree
        return tree_rows(sequence, self.tokens[:1], tree.tokens, tree.parent_indices, tree.depths)

    def commit(self, runner: ModelRunner, sequence: KVSequence) -> IntArray:
        """Makes the rows part of the sequence; its text after that."""
        committed = self.tokens if self.tree is None else self.tokens[:1]
        sequence.length += len(committed)
        runner.accept(sequence, self.accepted)
        return np.concatenate((self.cached, committed, self.tokens[1:][self.accepted]))


def random_work(kind: str, length: int, rows: int, rng: np.random.Generator) -> Work:
    cached, tokens = rng.integers(1, VOCAB, length), rng.integers(1, VOCAB, rows)
    if kind == "chunk":
        first = int(rng.choice((0, rows // 2, rows - 1, rows)))
        none = np.zeros(0, np.int64)
        return Work(cached=cached, tokens=tokens, tree=None, first_logit_row=first, accepted=none)
    nodes = {"lone root": 0, "chain": min(rows - 1, 32), "bushy": rows - 1}[kind]
    if kind == "chain":
        parents = list(range(-1, nodes - 1))
    else:
        parents = [int(rng.integers(max(ROOT, node - 6), node)) for node in range(nodes)]
    tree = DraftTree(
        tokens=tokens[1 : nodes + 1],
        parent_indices=np.array(parents, np.int64),
        scores=np.ones(nodes),
        law=Law.DETERMINISTIC,
    )
    path = tree.ancestor_mask[rng.integers(0, nodes)].nonzero()[0] if nodes else tree.tokens
    kept = path[: int(rng.integers(0, len(path) + 1))]
    return Work(cached=cached, tokens=tokens[: nodes + 1], tree=tree, first_logit_row=0, accepted=kept)


def random_works(count: int, rng: np.random.Generator) -> list[Work]:
    """Work of ``count`` sequences; the kinds and lengths differ from one count to the next."""
    works, left = [], MAX_ROWS
    for index in range(count):
        most = left - (count - index - 1)
        rows = int(rng.integers(1, min(most, 2 * MAX_ROWS // count) + 1))
        kind = KINDS[(index + count) % len(KINDS)]
        length = LENGTHS[(index + 5 * count) % len(LENGTHS)]
        works.append(random_work(kind, length, rows, rng))
        left -= rows
    return works


def check_ragged_forwards(runner: ModelRunner, tolerance: float = 0.0) -> None:
    """Logits and KV of 1 to 8 sequences are those of each alone, in any order of the parts.

    runner: with room for nine sequences. tolerance: 0 means bitwise.
    """
    rng = np.random.default_rng(0)
    for count in range(1, MAX_SEQUENCES + 1):
        check_one_forward(runner, random_works(count, rng), tolerance, rng)
    runner.cache.check_idle()


def check_one_forward(
    runner: ModelRunner, works: Sequence[Work], tolerance: float, rng: np.random.Generator
) -> None:
    sequences = [opened(runner, work.cached) for work in works]
    parts = [work.rows(sequence) for work, sequence in zip(works, sequences, strict=True)]
    alone = [runner.forward([part]) for part in parts]
    pool = runner.cache.pool.clone()
    orders = [np.arange(len(parts)), np.arange(len(parts))[::-1], rng.permutation(len(parts))]
    for order in orders:
        # What the forward does not write itself must show.
        runner.cache.pool[:, np.concatenate([part.slots for part in parts])] = torch.nan
        logits = runner.forward([parts[index] for index in order])
        require_equal(logits, torch.cat([alone[index] for index in order]), tolerance)
        require_equal(without_trash(runner.cache.pool), without_trash(pool), tolerance)
    for work, sequence in zip(works, sequences, strict=True):
        text = work.commit(runner, sequence)
        fresh = opened(runner, text)
        require_equal(kv(runner, sequence), kv(runner, fresh), tolerance)
        fresh.close()
        sequence.close()


def kv(runner: ModelRunner, sequence: KVSequence) -> torch.Tensor:
    """What the pool holds of a sequence's text, in the order of positions."""
    return runner.cache.pool[:, sequence.slots(0, sequence.length)]


def without_trash(pool: torch.Tensor) -> torch.Tensor:
    """Every slot but the one that rows without a sequence write to."""
    return pool[:, TRASH_SLOT + 1 :]


def require_equal(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape, f"{found.shape} instead of {expected.shape}"
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
