"""Small ways to run a decoder in tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from outrider.actors.model_runner import ModelRunner
from outrider.actors.runner import TreeQuery
from outrider.actors.target_worker import Network
from outrider.models.batch import text_rows
from outrider.models.block_pool import blocks_for
from outrider.models.config import load_config
from outrider.models.decoder import Decoder
from outrider.models.kv_cache import KVSequence
from outrider.models.numerics import MAX_ROWS, Numerics
from outrider.models.weights import Checkpoint
from outrider.speculation.tree import DraftTree, Law

MAX_NODES = 63


def make_runner(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    numerics: Numerics = Numerics.CANONICAL,
    *,
    num_sequences: int = 1,
) -> ModelRunner:
    config = load_config(folder)
    decoder = Decoder(
        config,
        Checkpoint(folder),
        dtype=dtype,
        numerics=numerics,
        max_model_len=config.max_position_embeddings,
    )
    return ModelRunner(decoder, num_blocks=blocks_of(decoder, num_sequences))


def blocks_of(network: Network, num_sequences: int) -> int:
    """Blocks for so many sequences of full length, each with the rows of a forward."""
    return num_sequences * blocks_for(network.max_model_len + MAX_ROWS)


def random_ids(count: int, vocab: int = 300, seed: int = 0) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, vocab, count)


def opened(runner: ModelRunner, tokens: npt.NDArray[np.int64]) -> KVSequence:
    """A sequence with ``tokens`` cached, by nothing but forwards, and room for a forward's rows."""
    sequence = KVSequence(runner.cache)
    extend(runner, sequence, tokens)
    return sequence


def extend(runner: ModelRunner, sequence: KVSequence, tokens: npt.NDArray[np.int64]) -> None:
    """Caches ``tokens`` behind what a sequence holds."""
    assert sequence.reserve(sequence.length + len(tokens) + MAX_ROWS)
    for start in range(0, len(tokens), MAX_ROWS):
        chunk = tokens[start : start + MAX_ROWS]
        runner.verify([TreeQuery(sequence=sequence, tokens=chunk, tree=None)])


def chunked_logits(
    runner: ModelRunner, ids: npt.NDArray[np.int64], chunks: Sequence[int]
) -> tuple[torch.Tensor, KVSequence]:
    """Logits after every token when the text comes in chunks of these sizes, and the sequence."""
    assert sum(chunks) == len(ids)
    sequence = opened(runner, ids[:0])
    assert sequence.reserve(len(ids))
    parts, start = [], 0
    for size in chunks:
        rows = text_rows(sequence, ids[start : start + size], first_logit_row=0)
        parts.append(runner.forward([rows]))
        sequence.length += size
        start += size
    return torch.cat(parts), sequence


def verify(runner: ModelRunner, sequence: KVSequence, root: int, tree: DraftTree) -> torch.Tensor:
    """Logits ``[1 + nodes, vocab]`` of one sequence in a forward of its own."""
    assert sequence.reserve(sequence.length + 1 + len(tree))
    (logits,) = runner.verify([TreeQuery(sequence=sequence, tokens=np.array([root]), tree=tree)])
    return logits


def bushy_tree(path: npt.NDArray[np.int64], junk: int, vocab: int = 300) -> tuple[DraftTree, list[int]]:
    """A tree with ``path`` in it and ``junk`` wrong siblings before every node of it.

    Returns the tree and the node indices of the path.
    """
    tokens: list[int] = []
    parents: list[int] = []
    nodes: list[int] = []
    above = -1
    for depth, token in enumerate(path.tolist()):
        for offset in range(1, junk + 1):
            tokens.append((token + offset + depth) % vocab)
            parents.append(above)
        tokens.append(token)
        parents.append(above)
        above = len(tokens) - 1
        nodes.append(above)
    tree = DraftTree(
        tokens=np.array(tokens),
        parent_indices=np.array(parents),
        scores=np.ones(len(tokens)),
        law=Law.DETERMINISTIC,
    )
    return tree, nodes
