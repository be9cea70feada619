"""Which part of a network each rank of a tensor-parallel group holds.

Queries, keys, values, gate and up are split by outputs; the products behind them, output and down, by
the same inputs, so that their results only have to be added up. Embedding and head are split by tokens.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from outrider.models.config import ModelConfig
from outrider.models.parallel import TensorParallel
from outrider.models.weights import Checkpoint
from outrider.speculation.errors import InvalidConfigError


def check_divisible(config: ModelConfig, size: int) -> None:
    """Refuses a number of ranks among which the network cannot be divided evenly.

    Raises:
        InvalidConfigError: ``size`` is not positive or does not divide what has to be divided.
    """
    H, G, inner = config.num_heads, config.num_kv_heads, config.intermediate_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InvalidConfigError(f"tensor_parallel_size must be a positive integer, not {size!r}")
    for count, what in ((H, "attention heads"), (inner, "inner units")):
        if count % size:
            raise InvalidConfigError(
                f"tensor_parallel_size {size} does not divide the model's {count} {what}"
            )
    if G % size and size % G:
        raise InvalidConfigError(
            f"tensor_parallel_size {size} neither divides the model's {G} key/value heads nor is a multiple"
        )


class Shard:
    """The slices of a network that one rank reads.

    whole: the network. own: the same as if this rank's part were all of it, but for its vocabulary.
    query, key_value, inner: rows of the weights split by outputs. vocabulary: rows of embedding and head.
    attended: columns of the output projection.
    vocabulary_rows: the same for each rank; what ``vocabulary`` lacks of it is filled up with zeros.
    adds_biases: whether this rank's products of split inputs add the biases, which is done once.

    Raises:
        InvalidConfigError: see ``check_divisible``.
    """

    def __init__(self, config: ModelConfig, ranks: TensorParallel) -> None:
        check_divisible(config, ranks.size)
        rank, size = ranks.rank, ranks.size
        self.whole, self.ranks = config, ranks
        heads, inner = config.num_heads // size, config.intermediate_size // size
        # With fewer key/value heads than ranks, neighbours share one.
        kv_heads = max(1, config.num_kv_heads // size)
        first_kv_head = rank * config.num_kv_heads // size
        self.own = replace(config, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=inner)
        D = config.head_dim
        self.query = self.attended = slice(rank * heads * D, (rank + 1) * heads * D)
        self.key_value = slice(first_kv_head * D, (first_kv_head + kv_heads) * D)
        self.inner = slice(rank * inner, (rank + 1) * inner)
        self.vocabulary_rows = -(-config.vocab_size // size)
        start, stop = (min(each * self.vocabulary_rows, config.vocab_size) for each in (rank, rank + 1))
        self.vocabulary = slice(start, stop)
        self.adds_biases = rank == 0

    def of_vocabulary(
        self, checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """This rank's rows of embedding or head, ``[vocabulary_rows, hidden]``."""
        shape = (self.whole.vocab_size, self.whole.hidden_size)
        weight = checkpoint.tensor(name, shape, rows=self.vocabulary).to(device, dtype)
        missing = self.vocabulary_rows - len(weight)
        return F.pad(weight, (0, 0, 0, missing)) if missing else weight

    def embed(self, embedding: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings ``[R, hidden]`` of ``tokens`` int64 ``[R]``; embedding: see ``of_vocabulary``."""
        if self.ranks.size == 1:
            return embedding[tokens]
        rows = tokens - self.vocabulary.start
        others = (rows < 0) | (rows >= self.vocabulary_rows)
        x = embedding[rows.masked_fill(others, 0)]
        return self.ranks.sum(x.masked_fill_(others[:, None], 0))
