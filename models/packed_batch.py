"""A forward's numbers in one tensor, so that they reach a device in one copy and may be replaced there.

R rows of S sequences, W words of a bitmask; all int32. Every field begins at a multiple of 16 bytes,
for which kernels are compiled, and may be longer than what is in it: then it is filled up with rows
that attend nothing and write where nobody reads.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.paged_attention import PagedPaths, TreeKeys
from outrider.kernels.path_attention import PathKeys
from outrider.models.batch import Batch
from outrider.models.kv_cache import TRASH_SLOT

_ALIGNED = 4
"""Numbers in 16 bytes."""

Field = tuple[str, npt.NDArray[np.integer], int]
"""Name, numbers, and what it is filled up with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How much a forward may hold.

    rows: of which at most ``rows`` logits are wanted. sequences: 0 where rows go by their paths.
    blocks: of all tables. nodes: entries of paths, or nodes of all sequences. words: of a row's
    bitmask; 0 where rows go by their paths. longest: as in ``TreeKeys`` and ``PagedPaths``.
    """

    rows: int
    sequences: int
    blocks: int
    nodes: int
    words: int
    longest: int

    @classmethod
    def of(cls, batch: Batch, rows: int) -> "Room":
        """Exactly what a batch takes when it is filled up to so many rows."""
        keys = batch.attended
        if isinstance(keys, PathKeys):
            longest = int(_lengths(keys).max())
            return cls(
                rows=rows,
                sequences=0,
                blocks=len(keys.tables),
                nodes=len(keys.nodes),
                words=0,
                longest=longest,
            )
        assert isinstance(keys, TreeKeys)
        return cls(
            rows=rows,
            sequences=len(keys.table_starts),
            blocks=len(keys.tables),
            nodes=len(keys.node_slots),
            words=keys.ancestors.shape[1],
            longest=keys.longest,
        )

    def holds(self, other: "Room") -> bool:
        """Whether what takes ``other`` fits."""
        return all(getattr(self, each.name) >= getattr(other, each.name) for each in fields(self))

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers of each field, in order."""
        rows, starts = self.rows, self.sequences + 1
        own = dict.fromkeys(("tokens", "positions", "slots", "wanted", "first", "seen"), rows)
        if not self.sequences:
            by_row = dict.fromkeys(("table_starts", "node_starts", "length"), rows)
            return {**own, **by_row, "tables": self.blocks, "nodes": self.nodes}
        return {
            **own,
            "row_starts": starts,
            "table_starts": self.sequences,
            "node_starts": starts,
            "tables": self.blocks,
            "node_slots": self.nodes,
            "ancestors": rows * self.words,
        }


class PackedBatch:
    """A batch on a device; what ``load`` puts there is what kernels see that hold its tensors.

    batch: as the decoder takes it, of ``room.rows`` rows, all of whose logits are wanted.
    """

    def __init__(self, room: Room, device: torch.device) -> None:
        self.room = room
        self._sizes = room.sizes
        ends = np.cumsum([-(-size // _ALIGNED) * _ALIGNED for size in self._sizes.values()]).tolist()
        self._starts = dict(zip(self._sizes, [0, *ends], strict=False))
        self._numbers = torch.empty(ends[-1], dtype=torch.int32, device=device)
        views = {name: self._view(name) for name in self._sizes}
        self._wanted = views.pop("wanted")
        own = {name: views.pop(name) for name in ("tokens", "positions", "slots")}
        self.batch = Batch(**own, attended=self._attended(views), logit_rows=slice(0, room.rows))

    def load(self, batch: Batch | None) -> None:
        """Copies a batch for which there is room, or one without rows."""
        host = torch.zeros(len(self._numbers), dtype=torch.int32, pin_memory=self._numbers.is_cuda)
        numbers = host.numpy()
        for name, values, filling in _fields(batch, self.room):
            start, size = self._starts[name], self._sizes[name]
            numbers[start : start + len(values)] = values
            if filling:
                numbers[start + len(values) : start + size] = filling
        # The allocator of pinned memory does not give it to anybody before it was copied.
        self._numbers.copy_(host, non_blocking=True)

    def wanted(self, count: int) -> torch.Tensor:
        """The first ``count`` rows whose logits are wanted, int32, where they were given one by one."""
        return self._wanted[:count]

    def _view(self, name: str) -> torch.Tensor:
        start = self._starts[name]
        return self._numbers[start : start + self._sizes[name]]

    def _attended(self, views: dict[str, torch.Tensor]) -> PagedPaths | TreeKeys:
        if not self.room.sequences:
            return PagedPaths(**views, longest=self.room.longest)
        views["ancestors"] = views["ancestors"].view(self.room.rows, self.room.words)
        return TreeKeys(**views, longest=self.room.longest)


def to_device(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device, which nobody waits for."""
    if device.type == "cpu":
        return numbers.clone()
    return numbers.pin_memory().to(device, non_blocking=True)


def _lengths(keys: PathKeys) -> npt.NDArray[np.int64]:
    """Where each row's path ends; int64 ``[R]``."""
    lengths: npt.NDArray[np.int64] = keys.seen + np.diff(keys.node_starts)
    return lengths


def _fields(batch: Batch | None, room: Room) -> Iterator[Field]:
    """What stands in a batch's fields; zeros are left out."""
    if batch is None:
        yield "slots", np.zeros(0, np.int64), TRASH_SLOT
        return
    yield "tokens", batch.tokens.numpy(), 0
    yield "positions", batch.positions.numpy(), 0
    yield "slots", batch.slots.numpy(), TRASH_SLOT
    if not isinstance(batch.logit_rows, slice):
        yield "wanted", batch.logit_rows.numpy(), 0
    keys = batch.attended
    if isinstance(keys, PathKeys):
        for name in ("tables", "table_starts", "first", "seen", "nodes"):
            yield name, getattr(keys, name), 0
        yield "node_starts", keys.node_starts[:-1], 0
        yield "length", _lengths(keys), 0
    else:
        assert isinstance(keys, TreeKeys)
        yield from _tree_fields(keys, room)


def _tree_fields(keys: TreeKeys, room: Room) -> Iterator[Field]:
    for name in ("tables", "table_starts", "seen", "node_slots"):
        yield name, getattr(keys, name).numpy(), 0
    # Rows that fill up are the last sequence's, and hide nothing of what its own rows see.
    yield "first", keys.first.numpy(), int(keys.first[-1])
    yield "row_starts", keys.row_starts.numpy()[:-1], room.rows
    yield "node_starts", keys.node_starts.numpy(), len(keys.node_slots)
    words = np.zeros((len(keys.seen), room.words), np.int32)
    words[:, : keys.ancestors.shape[1]] = keys.ancestors.numpy()
    yield "ancestors", words.reshape(-1), 0
