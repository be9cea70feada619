"""A target of several ranks: its leader, used like a decoder, and the loop of those that follow.

Rank 0 holds everything that is decided: requests, trees, blocks. The others hold their part of the network
and of the KV cache, and do as they are told.
"""

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch

from outrider.actors.target_steps import Forward, MakeCache, Measure, Move, Step, Stop, decode, encode
from outrider.models.batch import Batch
from outrider.models.decoder import Decoder
from outrider.models.device_memory import DeviceMemory
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
    def device(self) -> torch.device: ...

    @property
    def block_bytes(self) -> int: ...

    @property
    def attention_dtype(self) -> torch.dtype: ...

    @property
    def window(self) -> int | None: ...

    def memory(self, rows: int) -> DeviceMemory: ...

    def make_cache(self, num_blocks: int, *, prefix_caching: bool = True) -> KVCache: ...

    def capture(self, cache: KVCache) -> None: ...

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
        self.device, self.block_bytes = decoder.device, decoder.block_bytes
        self._moves: list[Step] = []
        """KV moves that the other ranks will be told of with the next forward."""

    def memory(self, rows: int) -> DeviceMemory:
        """See ``Decoder``."""
        with self._led(Measure(rows)):
            return self.decoder.memory(rows)

    def make_cache(self, num_blocks: int, *, prefix_caching: bool = True) -> KVCache:
        """See ``Decoder``; every rank makes its part."""
        self._ranks.tell(encode([MakeCache(num_blocks)]))
        cache = self.decoder.make_cache(num_blocks, prefix_caching=prefix_caching)
        move_own = cache.move

        def move(source: torch.Tensor, target: torch.Tensor) -> None:
            self._moves.append(Move(source, target))
            move_own(source, target)

        cache.move = move
        return cache

    def capture(self, cache: KVCache) -> None:
        """See ``Decoder``; what ranks send each other is not captured (docs/gpu.md)."""

    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """See ``Decoder``."""
        with self._led(*self._moves, Forward(batch)):
            self._moves = []
            return self.decoder.forward(batch, cache)

    def stop(self) -> None:
        """Sends the other ranks home, if they can still be reached."""
        with contextlib.suppress(TargetGroupError):
            self._ranks.tell(encode([Stop()]), timeout=STOP_SECONDS)
        self._ranks.leave("the tensor-parallel target has been stopped")

    @contextlib.contextmanager
    def _led(self, *steps: Step) -> Iterator[None]:
        """Has the others do these, while this rank does so, too."""
        try:
            self._ranks.tell(encode(steps))
            yield
            self._ranks.settle()
        except BaseException as error:
            # The others are in the middle of something that will not be finished.
            self._ranks.abort(f"a step of the tensor-parallel target was given up: {error!r}")
            raise


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
                case Measure(rows):
                    decoder.memory(rows)
                case Stop():
                    ranks.leave("rank 0 has stopped the tensor-parallel target")
                    return
