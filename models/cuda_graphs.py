"""Common steps, captured once and replayed: a device is told of all of a forward's work at once.

A step of few rows is some hundred launches, which take longer to ask for than to do. A captured one
reads its numbers from a fixed place (``PackedBatch``), so it serves every batch for which it has room;
rows that only fill it up attend nothing. Steps that fit nowhere, and those that want no logits, run
operation by operation.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from outrider.models.batch import Batch
from outrider.models.block_pool import blocks_for
from outrider.models.kernel_set import Capture, Run
from outrider.models.numerics import MAX_TAIL, RowClasses
from outrider.models.packed_batch import PackedBatch, Room
from outrider.speculation.tree import MAX_TREE_DEPTH

ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Rows of captured steps."""
SHORTEST, STRIDE = 1024, 8
"""Positions that the shortest steps have room for, and how much longer the next ones are."""
MOST = 2**19
"""Rows times positions of the largest: attention keeps float32 numbers in proportion to them."""


def common_rooms(classes: RowClasses, max_model_len: int) -> list[Room]:
    """What to capture steps for: whole row classes, short and long texts, one sequence or several."""
    return [
        _room(classes, rows, sequences, longest)
        for rows in ROWS
        if classes.linear_rows(rows) == rows
        for longest in _lengths(max_model_len + MAX_TREE_DEPTH)
        if rows * longest <= MOST
        # Along paths nobody asks how many sequences there are.
        for sequences in sorted({1, rows} if classes.by_tree else {rows})
    ]


def largest_room(classes: RowClasses, rows: int, max_model_len: int) -> Room:
    """That of a step of so many rows of one sequence, below the longest text."""
    return _room(classes, classes.linear_rows(rows), 1, max_model_len + MAX_TREE_DEPTH)


def _room(classes: RowClasses, rows: int, sequences: int, longest: int) -> Room:
    return Room(
        rows=rows,
        sequences=sequences if classes.by_tree else 0,
        blocks=sequences * blocks_for(longest),
        nodes=rows * MAX_TREE_DEPTH,
        words=MAX_TAIL // 32 if classes.by_tree else 0,
        longest=longest,
    )


def _lengths(longest: int) -> Iterator[int]:
    length = SHORTEST
    while length < longest:
        yield length
        length *= STRIDE
    yield longest


class CapturedSteps:
    """Steps of one network over one cache.

    run: the forward of a batch on the device, all of whose rows want logits ``[rows, vocab]``.
    rooms: what steps are captured for. classes: of the network.
    """

    def __init__(
        self,
        run: Callable[[Batch], torch.Tensor],
        rooms: Iterable[Room],
        *,
        classes: RowClasses,
        device: torch.device,
        capture: Capture,
    ) -> None:
        self._classes = classes
        self._steps: list[_Step] = []
        # The largest first: what the others keep for the time of a step then fits in its memory.
        for room in sorted(rooms, key=_size, reverse=True):
            packed = PackedBatch(room, device)
            packed.load(None)
            self._steps.append(_Step(packed, run, capture))
        self._steps.reverse()

    def forward(self, batch: Batch) -> torch.Tensor | None:
        """Logits ``[wanted, vocab]`` of a batch that stands on the CPU; None where no step is for it."""
        wanted = batch.logit_rows
        if isinstance(wanted, slice) and wanted.start == wanted.stop:
            return None
        needed = Room.of(batch, self._classes.linear_rows(len(batch.tokens)))
        step = next((each for each in self._steps if each.packed.room.holds(needed)), None)
        return None if step is None else step.forward(batch)


def _size(room: Room) -> tuple[int, int, int]:
    return room.rows, room.longest, room.sequences


class _Step:
    """One captured step."""

    def __init__(self, packed: PackedBatch, run: Callable[[Batch], torch.Tensor], capture: Capture) -> None:
        self.packed = packed
        self._replay, self._logits = capture(lambda: run(packed.batch))

    def forward(self, batch: Batch) -> torch.Tensor:
        """The logits, which the next replay leaves alone."""
        self.packed.load(batch)
        self._replay()
        wanted = batch.logit_rows
        if isinstance(wanted, slice):
            return self._logits[wanted].clone()
        return self._logits.index_select(0, self.packed.wanted(len(wanted)))


class CudaCapture:
    """Captures CUDA graphs that share memory, for they are replayed one at a time; a ``Capture``."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Run) -> tuple[Callable[[], None], torch.Tensor]:
        """See ``Capture``."""
        # The first run compiles kernels and makes libraries' workspaces, which cannot be captured.
        cuda: Any = torch.cuda  # Partly without types.
        aside = cuda.Stream()
        aside.wait_stream(cuda.current_stream())
        with cuda.stream(aside):
            run()
        cuda.current_stream().wait_stream(aside)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, pool=self._pool):
            result = run()
        self._pool = graph.pool()
        return graph.replay, result
