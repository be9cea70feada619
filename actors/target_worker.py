"""A target of several ranks: its leader, used like a decoder, and the loop of those that follow.

Rank 0 holds everything that is decided: requests, trees, blocks. The others hold their part of the network
and of the KV cache, and do as they are told.
"""

import contextlib
from typing import Protocol

import torch

from outrider.actors.target_steps import Forward, MakeCache, Move, Step, Stop, decode, encode
from outrider.kernels.kv_move import kv_move
from outrider.models.batch import Batch
from outrider.models.decoder import Decoder
from outrider.models.kv_cache import KVCache
from outrider.models.numerics import RowClasses
from outrider.models.parallel import RankGroup
from outrider.speculation.errors import TargetGroupError

STOP_SECONDS = 1.0
"""For the others to hear that there are no more steps."""


class Network(Protocol):
    """What a runner needs of a decoder; see ``Decoder``."""

    @property
    def max_model_len(self) -> int: ...

    @property
    def classes(self) -> RowClasses: ...

    @property
    def attention_dtype(self) -> torch.dtype: ...

    @property
    def window(self) -> int | None: ...

    def make_cache(self, num_blocks: int, *, prefix_caching: bool = True) -> KVCache: ...

    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor: ...


class TargetLeader:
    """Rank 0's decoder, which has the other ranks do whatever it does. It has one cache.

    Raises, in everything it does:
        TargetGroupError: a rank is gone; whatever is asked afterwards fails likewise.
    """

    def __init__(self, decoder: Decoder, ranks: RankGroup) -> None:
        self.decoder, self._ranks = decoder, ranks
        self.max_model_len, self.classes = decoder.max_model_len, decoder.classes
        self.attention_dtype, self.window = decoder.attention_dtype, decoder.window
        self._moves: list[Step] = []
        """KV moves that the other ranks will be told of with the next forward."""

    def make_cache(self, num_blocks: int, *, prefix_caching: bool = True) -> KVCache:
        """See ``Decoder``; every rank makes its part."""
        self._ranks.tell(encode([MakeCache(num_blocks)]))
        cache = self.decoder.make_cache(num_blocks, prefix_caching=prefix_caching)

        def move(source: torch.Tensor, target: torch.Tensor) -> None:
            self._moves.append(Move(source, target))
            kv_move(cache.pool, source, target)

        cache.move = move
        return cache

    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """See ``Decoder``."""
        try:
            self._ranks.tell(encode([*self._moves, Forward(batch)]))
            self._moves = []
            return self.decoder.forward(batch, cache)
        except BaseException as error:
            # The others are in the middle of something that will not be finished.
            self._ranks.abort(f"a step of the tensor-parallel target was given up: {error!r}")
            raise

    def stop(self) -> None:
        """Sends the other ranks home, if they can still be reached."""
        with contextlib.suppress(TargetGroupError):
            self._ranks.tell(encode([Stop()]), timeout=STOP_SECONDS)
        self._ranks.leave("the tensor-parallel target has been stopped")


def follow(decoder: Decoder, ranks: RankGroup) -> None:
    """Does what rank 0 says, until it says that this is all.

    Raises:
        TargetGroupError: another rank is gone.
    """
    cache = decoder.make_cache(0)
    while True:
        for step in decode(ranks.hear(), decoder.attention_dtype):
            match step:
                case Forward(batch):
                    decoder.forward(batch, cache)
                case Move(source, target):
                    cache.move(source, target)
                case MakeCache(num_blocks):
                    cache = decoder.make_cache(num_blocks)
                case Stop():
                    return
