"""Captured steps with a stand-in for CUDA's graphs: the function itself, run again on the same buffers."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from instruments.cuda_stand_in import rerun

from outrider.kernels.paged_attention import PagedPaths, TreeKeys
from outrider.models.batch import Batch, Rows, make_batch
from outrider.models.cuda_graphs import CapturedSteps, common_rooms
from outrider.models.device import CPU
from outrider.models.kernel_set import Run
from outrider.models.kv_cache import TRASH_SLOT
from outrider.models.numerics import RowClasses
from outrider.models.packed_batch import PackedBatch, Room
from outrider.speculation.tree import ROOT

PATHS = RowClasses(canonical=True, by_path=True)
TREES = RowClasses(canonical=False, by_tree=True)
CONTEXT = 3000


def rows_of(count: int, *, nodes: int = 0, length: int = 40, first_block: int = 7, seed: int = 0) -> Rows:
    """``count`` rows, the last ``nodes`` of them a chain, behind ``length`` tokens."""
    rng = np.random.default_rng(seed)
    committed = length + count - nodes
    positions = np.arange(length, length + count)
    return Rows(
        tokens=rng.integers(0, 300, count),
        positions=positions,
        slots=first_block * 32 + positions,
        committed=committed,
        nodes=np.concatenate((np.full(count - nodes, ROOT), np.arange(nodes))),
        node_parents=np.arange(nodes) - 1,
        node_depths=np.arange(nodes) + 1,
        node_slots=(first_block * 32 + positions)[count - nodes :],
        table=first_block + np.arange(-(-committed // 32) + 2),
        first_logit_row=count - nodes - 1,
    )


def seen_by(batch: Batch) -> torch.Tensor:
    """Of every row what a network could see of it: ``[R, 9]``."""
    keys = batch.attended
    assert isinstance(keys, PagedPaths | TreeKeys)
    own = torch.stack((batch.tokens, batch.positions, batch.slots, keys.first, keys.seen), 1)
    rows = torch.arange(len(own))
    if isinstance(keys, PagedPaths):
        entries = [_nodes_of(keys, int(row)) for row in rows]
        begins = keys.table_starts
    else:
        sequence = torch.searchsorted(keys.row_starts, rows, right=True) - 1
        sequence.clamp_(max=len(keys.table_starts) - 1)
        begins = keys.table_starts[sequence]
        entries = [_visible(keys, int(row), int(sequence[row])) for row in rows]
    blocks = keys.tables[begins.clamp(max=max(0, len(keys.tables) - 1))]
    sums = torch.tensor([[len(each), sum(each), max(each, default=0)] for each in entries])
    return torch.cat((own, blocks[:, None], sums), 1).double()


def _nodes_of(keys: PagedPaths, row: int) -> list[int]:
    start, count = int(keys.node_starts[row]), int(keys.length[row] - keys.seen[row])
    return [int(each) for each in keys.nodes[start : start + count]]


def _visible(keys: TreeKeys, row: int, sequence: int) -> list[int]:
    nodes = keys.node_slots[keys.node_starts[sequence] : keys.node_starts[sequence + 1]].tolist()
    words = keys.ancestors[row].tolist()
    return [slot for node, slot in enumerate(nodes) if words[node // 32] >> node % 32 & 1]


def captured(classes: RowClasses, rooms: list[Room] | None = None) -> tuple[CapturedSteps, list[Room]]:
    ran: list[Room] = []

    def capture(run: Run) -> tuple[Callable[[], None], torch.Tensor]:
        replay, result = rerun(run)

        def noted() -> None:
            ran.append(room)
            replay()

        room = rooms_left.pop()
        return noted, result

    rooms = common_rooms(classes, CONTEXT) if rooms is None else rooms
    rooms_left = sorted(rooms, key=lambda room: (room.rows, room.longest, room.sequences))
    return CapturedSteps(seen_by, rooms, classes=classes, device=CPU, capture=capture), ran


def eagerly(batch: Batch, classes: RowClasses) -> torch.Tensor:
    packed = PackedBatch(Room.of(batch, classes.linear_rows(len(batch.tokens))), CPU)
    packed.load(batch)
    return seen_by(packed.batch)[batch.logit_rows]


STEPS = [
    [rows_of(1)],
    [rows_of(5, nodes=4), rows_of(1, first_block=40, length=1100)],
    [rows_of(3, nodes=1, length=2500), rows_of(3, first_block=90), rows_of(9, nodes=8, first_block=93)],
    [rows_of(64, nodes=63)],
    [rows_of(1, first_block=3 * index) for index in range(33)],
    [rows_of(2, nodes=1, seed=9)],
]


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("classes", [PATHS, TREES], ids=["paths", "trees"])
def test_replays_see_what_a_step_of_its_own_would(classes: RowClasses, window: int | None) -> None:
    steps, ran = captured(classes)
    # Twice: what one step leaves behind must not show in the next.
    for parts in [*STEPS, *STEPS[::-1]]:
        batch = make_batch(parts, classes, torch.float32, window)
        logits = steps.forward(batch)
        assert logits is not None
        assert torch.equal(logits, eagerly(batch, classes))
    assert len(ran) == 2 * len(STEPS)


def test_a_step_takes_the_smallest_that_holds_it() -> None:
    steps, ran = captured(TREES)
    for parts in STEPS:
        steps.forward(make_batch(parts, TREES, torch.float32))
    assert [(room.rows, room.sequences, room.longest) for room in ran] == [
        (1, 1, 1024),
        (8, 8, 3032),
        (16, 16, 3032),
        (64, 1, 1024),
        (64, 64, 1024),
        (2, 1, 1024),
    ]


def test_what_fits_nowhere_is_not_replayed() -> None:
    steps, ran = captured(PATHS)
    too_long = rows_of(1, length=CONTEXT + 500)
    silent = replace(rows_of(4), first_logit_row=4)
    for rows in (rows_of(65), too_long, silent):
        assert steps.forward(make_batch([rows], PATHS, torch.float32)) is None
    assert not ran


def test_rows_come_in_whole_classes() -> None:
    classes = RowClasses(canonical=True, linear=16, by_path=True)
    rooms = common_rooms(classes, CONTEXT)
    assert sorted({room.rows for room in rooms}) == [16, 32, 64]
    steps, ran = captured(classes, rooms)
    steps.forward(make_batch([rows_of(17)], classes, torch.float32))
    assert ran[0].rows == 32


def test_large_steps_over_long_texts_are_not_captured() -> None:
    rooms = common_rooms(PATHS, 131_072)
    longest = {rows: max(room.longest for room in rooms if room.rows == rows) for rows in (1, 4, 64)}
    assert longest == {1: 131_072 + 32, 4: 65_536, 64: 8192}


def test_rows_that_fill_up_attend_nothing_and_write_to_nobody() -> None:
    for classes in (PATHS, TREES):
        batch = make_batch([rows_of(3, nodes=1)], classes, torch.float32, window=4)
        packed = PackedBatch(Room.of(batch, 8), CPU)
        packed.load(batch)
        seen = seen_by(packed.batch)
        assert seen[3:, 2].tolist() == [TRASH_SLOT] * 5
        assert not seen[3:, 4].any(), "no position"
        assert not seen[3:, 6].any(), "no node"
        # A tile of rows begins where the earliest of them does.
        keys = packed.batch.attended
        if isinstance(keys, TreeKeys):
            assert keys.first[3:].tolist() == [keys.first[2]] * 5


def test_every_field_begins_at_a_multiple_of_sixteen_bytes() -> None:
    batch = make_batch([rows_of(3, nodes=1)], TREES, torch.float32)
    packed = PackedBatch(Room.of(batch, 3), CPU)
    keys = packed.batch.attended
    assert isinstance(keys, TreeKeys)
    views: list[torch.Tensor] = [packed.batch.tokens, packed.batch.positions, packed.batch.slots]
    views += [getattr(keys, name) for name in keys.__slots__ if name != "longest"]
    assert all(view.storage_offset() % 4 == 0 for view in views)


def test_wanted_rows_of_several_sequences() -> None:
    parts = [rows_of(4, nodes=1), rows_of(5, nodes=2, first_block=50, seed=3)]
    batch = make_batch(parts, PATHS, torch.float32)
    assert isinstance(batch.logit_rows, torch.Tensor)
    steps, _ = captured(PATHS)
    logits = steps.forward(batch)
    assert logits is not None
    kept = logits.clone()
    assert logits[:, 0].tolist() == batch.tokens[batch.logit_rows].tolist()
    steps.forward(make_batch([rows_of(9, nodes=8, seed=5)], PATHS, torch.float32))
    assert torch.equal(logits, kept), "the next step leaves these logits alone"
