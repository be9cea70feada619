"""Runs one network over sequences: prefill, tree forwards, commits. It decides nothing."""

import torch

from outrider.models.batch import Rows, make_batch, prefill_rows, tree_rows
from outrider.models.decoder import Decoder
from outrider.models.kv_cache import KVSequence, blocks_for
from outrider.models.numerics import MAX_ROWS
from outrider.speculation.tree import DraftTree
from outrider.speculation.types import IntArray


class ModelRunner:
    """One decoder and its KV cache.

    max_nodes: draft nodes whose KV a sequence can hold.
    num_sequences: sequences of full length that fit the cache.
    """

    def __init__(self, decoder: Decoder, *, max_nodes: int, num_sequences: int = 1) -> None:
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
            self.forward(sequence, prefill_rows(sequence, chunk), first_logit_row=len(chunk))
            sequence.length += len(chunk)

    def verify(self, sequence: KVSequence, root: int, tree: DraftTree) -> torch.Tensor:
        """Logits ``[1 + nodes, vocab]`` after the root, the last committed token, and after each node.

        The root becomes part of the cached text; the nodes stay speculative until ``accept``.
        """
        rows = tree_rows(sequence, root, tree.tokens, tree.depths, tree.ancestor_mask)
        logits = self.forward(sequence, rows, first_logit_row=0)
        sequence.length += 1
        return logits

    def accept(self, sequence: KVSequence, nodes: IntArray) -> None:
        """Makes the accepted path's KV (node indices from the root downwards) part of the text."""
        sequence.commit_nodes(nodes)

    def forward(self, sequence: KVSequence, rows: Rows, *, first_logit_row: int) -> torch.Tensor:
        """Logits of the rows from ``first_logit_row`` on."""
        decoder = self.decoder
        batch = make_batch(rows, sequence.base, decoder.classes, decoder.attention_dtype, first_logit_row)
        return decoder.forward(batch, self.cache)
