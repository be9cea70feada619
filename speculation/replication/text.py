"""The committed text of one request, as both sides keep it."""

import zlib

import numpy as np

from outrider.speculation.types import IntArray


class CommittedText:
    """Token ids in a growing array, and a hash of them that costs O(new tokens).

    prefix_hash: CRC-32 of all ids as little-endian int32: it finds a text that has come
        apart through loss or a mistake, and is no defence against forgery.
    """

    def __init__(self, token_ids: IntArray) -> None:
        self._ids = np.zeros(max(256, 2 * len(token_ids)), np.int64)
        self.length = 0
        self.prefix_hash = 0
        self.append(token_ids)

    @property
    def ids(self) -> IntArray:
        """int64 ``[length]``, a view that the next ``append`` may leave behind."""
        return self._ids[: self.length]

    def append(self, tokens: IntArray) -> None:
        """Takes in newly committed tokens, int64 ``[count]``."""
        end = self.length + len(tokens)
        if end > len(self._ids):
            grown = np.zeros(2 * end, np.int64)
            grown[: self.length] = self.ids
            self._ids = grown
        self._ids[self.length : end] = tokens
        self.length = end
        self.prefix_hash = hash_behind(self.prefix_hash, tokens)


def hash_behind(prefix_hash: int, tokens: IntArray) -> int:
    """The hash of a text continued by ``tokens`` (int64 ``[count]``)."""
    return zlib.crc32(tokens.astype("<i4").tobytes(), prefix_hash)
