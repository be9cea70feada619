"""Runs one network over sequences: prefill, tree forwards, commits. It decides nothing."""

from collections.abc import Sequence

import torch

from outrider.actors.runner import TreeQuery
from outrider.actors.target_worker import Network
from outrider.models.batch import Rows, make_batch, prefill_rows, tree_rows
from outrider.models.kv_cache import KVSequence, blocks_for
from outrider.models.numerics import MAX_ROWS
from outrider.speculation.types import IntArray


class ModelRunner:
    """One decoder, or all ranks of one, and its KV cache.

    max_nodes: draft nodes whose KV a sequence can hold.
    num_sequences: sequences of full length that fit the cache.
    """

    def __init__(self, decoder: Network, *, max_nodes: int, num_sequences: int = 1) -> None:
        self.decoder, self.max_nodes = decoder, max_nodes
        # The last verification may accept beyond the end of the text before it is cut.
        positions = decoder.max_model_len + max_nodes + 1
        per_sequence = blocks_for(positions) + blocks_for(max_nodes)
        self.cache = decoder.make_cache(num_sequences * per_sequence)

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        return self.decoder.max_model_len

    def open(self, max_tokens: int) -> KVSequence:
        """A sequence with room for ``max_tokens`` positions."""
        return KVSequence(self.cache, max_tokens=max_tokens, max_nodes=self.max_nodes)

    def prefill(self, sequence: KVSequence, tokens: IntArray) -> None:
        """Caches committed ``tokens`` (int64 ``[count]``) behind what is cached already."""
        for start in range(0, len(tokens), MAX_ROWS):
            chunk = tokens[start : start + MAX_ROWS]
            self.forward([prefill_rows(sequence, chunk, first_logit_row=len(chunk))])
            sequence.length += len(chunk)

    def verify(self, queries: Sequence[TreeQuery[KVSequence]]) -> list[torch.Tensor]:
        """One forward for queries of different sequences.

        Returns, per query, logits ``[1 + nodes, vocab]`` after the root and after each node.
        The roots become part of the cached texts; the nodes stay speculative until ``accept``.
        """
        logits = self.forward([_rows(query) for query in queries])
        for query in queries:
            query.sequence.length += 1
        return list(torch.split(logits, [1 + len(query.tree) for query in queries]))

    def accept(self, sequence: KVSequence, nodes: IntArray) -> None:
        """Makes the accepted path's KV (node indices from the root downwards) part of the text."""
        sequence.commit_nodes(nodes)

    def forward(self, parts: Sequence[Rows]) -> torch.Tensor:
        """Logits ``[wanted, vocab]`` of the rows that want them, in the order of the parts.

        The parts belong to different sequences and have at most ``MAX_ROWS`` rows together.
        """
        rows = sum(len(part.tokens) for part in parts)
        assert 0 < rows <= MAX_ROWS, f"a forward of {rows} rows"
        batch = make_batch(parts, self.decoder.classes, self.decoder.attention_dtype)
        return self.decoder.forward(batch, self.cache)


def _rows(query: TreeQuery[KVSequence]) -> Rows:
    tree = query.tree
    return tree_rows(query.sequence, query.root, tree.tokens, tree.depths, tree.ancestor_mask)
