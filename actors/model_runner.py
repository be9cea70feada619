"""Runs one network over sequences: text, trees, commits. It decides nothing."""

from collections.abc import Sequence

import torch

from outrider.actors.runner import TreeQuery
from outrider.actors.target_worker import Network
from outrider.models.batch import Rows, make_batch, text_rows, tree_rows
from outrider.models.kv_cache import KVSequence
from outrider.speculation.types import IntArray


class ModelRunner:
    """One decoder, or all ranks of one, and its KV cache.

    num_blocks: of the cache, all that sequences ever hold together.
    prefix_caching: whether texts begin with what earlier ones left in it.
    """

    def __init__(self, decoder: Network, *, num_blocks: int, prefix_caching: bool = True) -> None:
        self.decoder = decoder
        self.cache = decoder.make_cache(num_blocks, prefix_caching=prefix_caching)
        decoder.capture(self.cache)

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        return self.decoder.max_model_len

    def open(
        self, text: IntArray, like: tuple[KVSequence, int] | None = None, reusable: int | None = None
    ) -> KVSequence | None:
        """A sequence with room for ``text`` (int64 ``[n]``); None when there is none.

        It begins with what is cached of the first ``reusable`` tokens, by default of ``text[:-1]``: in
        published blocks, or, if that is more, in another sequence whose text has the same first tokens.

        like: that sequence, and how many.
        """
        reusable = len(text) - 1 if reusable is None else reusable
        sequence = KVSequence(self.cache)
        sequence.adopt(text[:reusable])
        shared = 0 if like is None else min(like[1], like[0].length, reusable)
        if like is not None and shared > sequence.length and like[0].can_fork(shared):
            sequence.close()
            child = like[0].fork(shared)
            if child is None:
                return None
            sequence = child
        if sequence.reserve(len(text)):
            return sequence
        sequence.close()
        return None

    def verify(self, queries: Sequence[TreeQuery[KVSequence]]) -> list[torch.Tensor]:
        """One forward for queries of different sequences that have room for their rows.

        Returns, per query, logits ``[text_logits + 1 + nodes, vocab]``: after the tokens of the text that
        want them, then after the last token and after each node, where there is a tree. The tokens
        become part of the cached texts; the nodes stay speculative until ``accept``.
        """
        parts = [_rows(query) for query in queries]
        logits = self.forward(parts)
        if logits.is_cuda and not len(logits):
            # Nobody waits for these rows, which would then seem to take no time, and the next ones more.
            torch.cuda.synchronize()
        for query in queries:
            query.sequence.length += len(query.tokens)
        return list(torch.split(logits, [len(part.tokens) - part.first_logit_row for part in parts]))

    def accept(self, sequence: KVSequence, nodes: IntArray) -> None:
        """Makes the accepted path's KV (node indices from the root downwards) part of the text.

        The nodes are those of the last ``verify``; the rest are dropped.
        """
        if len(nodes):
            start = sequence.length
            slots = sequence.slots(start, start + int(nodes.max()) + 1)
            sequence.keep(slots[nodes])
        sequence.shrink()

    def forward(self, parts: Sequence[Rows]) -> torch.Tensor:
        """Logits ``[wanted, vocab]`` of the rows that want them, in the order of the parts.

        The parts belong to different sequences and have at most ``RowClasses.max_rows`` rows together.
        """
        decoder = self.decoder
        rows = sum(len(part.tokens) for part in parts)
        assert 0 < rows <= decoder.classes.max_rows, f"a forward of {rows} rows"
        batch = make_batch(parts, decoder.classes, decoder.attention_dtype, decoder.window)
        return decoder.forward(batch, self.cache)


def _rows(query: TreeQuery[KVSequence]) -> Rows:
    sequence, text, tree = query.sequence, query.tokens, query.tree
    if tree is None:
        return text_rows(sequence, text, first_logit_row=len(text) - query.text_logits)
    return tree_rows(
        sequence, text, tree.tokens, tree.parent_indices, tree.depths, text_logits=query.text_logits
    )
