"""Tree attention over a paged KV pool: a tile of rows of one sequence reads each key once.

Committed positions are attended without a look at the tree; then the nodes, under a bitmask of
ancestors. Rows of a prompt are rows without nodes.
"""

import torch
import triton
import triton.language as tl

from outrider.kernels.gpu.splits import SPLIT, Parts, attend_chunk, chunk_of
from outrider.kernels.paged_attention import TreeKeys

_SMALLEST_TILE, _LARGEST_TILE = 16, 64
"""Queries of one program: what tensor cores take at least, and what registers hold of scores."""
_ROW_SPLITS = 4096
"""Rows times splits of the largest call, about."""
_TILE_BYTES = 2**14
"""Queries of one program; with more, registers do not hold their results either."""


def tree_attention(
    q: torch.Tensor, pool: torch.Tensor, keys: TreeKeys, block: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention ``[R, H, D]`` in q's dtype, in ``out`` if that is given; see ``tree_attention_reference``.

    q, pool, out: contiguous, of one dtype: bfloat16, float16 or float32. Sums are float32.
    """
    (R, H, D), G = q.shape, pool.shape[2]
    S, W = len(keys.table_starts), keys.ancestors.shape[1]
    Q, width = H // G, triton.next_power_of_2(D)
    tile = _tile_of(-(-R // S), Q, width * q.itemsize)
    tile_rows = tile // Q
    split = _split_of(R, keys.longest)
    splits = max(1, triton.cdiv(keys.longest, split))
    parts = Parts(q, splits, split) if splits > 1 else None
    out = torch.empty_like(q) if out is None else out
    target = out if parts is None else parts.values
    # Every sequence may leave its last tile partly empty, so this is enough tiles for any lengths.
    _attend_tiles[(R // tile_rows + S, G, splits)](
        q,
        pool,
        target,
        *((target, target) if parts is None else (parts.tops, parts.totals)),
        keys.row_starts,
        keys.tables,
        keys.table_starts,
        keys.first,
        keys.seen,
        keys.node_slots,
        keys.node_starts,
        keys.ancestors,
        R,
        S,
        W,
        H=H,
        G=G,
        D=D,
        B=block,
        TILE=tile,
        TILE_ROWS=tile_rows,
        CHUNK=chunk_of(pool, width),
        WIDTH=width,
        SPLIT=split,
        SEQUENCES=triton.next_power_of_2(S),
        WHOLE=parts is None,
        num_warps=4,
        num_stages=2,
    )
    return out if parts is None else parts.merged(out, keys.first, keys.seen, nodes_in_first=True)


def _split_of(rows: int, longest: int) -> int:
    """Positions of a split: many rows fill a device without being split, and each split takes memory."""
    wanted: int = triton.next_power_of_2(triton.cdiv(longest * rows, _ROW_SPLITS))
    return max(SPLIT, wanted)


def _tile_of(rows: int, Q: int, query_bytes: int) -> int:
    """Queries of one program, for sequences of ``rows`` rows with Q queries each."""
    least: int = max(_SMALLEST_TILE, triton.next_power_of_2(Q))
    wanted: int = triton.next_power_of_2(rows * Q)
    return max(least, min(wanted, _LARGEST_TILE, _TILE_BYTES // query_bytes))


@triton.jit
def _sequence_of(
    tile: tl.tensor, row_starts: tl.tensor, S: int, TILE_ROWS: tl.constexpr, SEQUENCES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Which sequence a tile belongs to, and its first row, which may lie behind the sequence's last.

    Sequence s has the tiles from ``row_starts[s] // TILE_ROWS + s`` on: at least as many as its
    rows need, so no table of tiles has to be made.
    """
    sequences = tl.arange(0, SEQUENCES)
    starts = tl.load(row_starts + sequences, mask=sequences < S, other=0).to(tl.int32)
    reached = (sequences < S) & (starts // TILE_ROWS + sequences <= tile)
    sequence = tl.sum(reached.to(tl.int32)) - 1
    start = tl.load(row_starts + sequence).to(tl.int32)
    return sequence, start + (tile - start // TILE_ROWS - sequence) * TILE_ROWS


@triton.jit
def _scores(
    queries: tl.tensor,
    pool: tl.tensor,
    entries: tl.tensor,
    real: tl.tensor,
    columns: tl.tensor,
    D: tl.constexpr,
    STEP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Scores ``[M, N]`` of ``queries`` ``[M, D]`` and the values ``[N, D]`` that belong to them.

    entries: int64 ``[N]``, where keys begin in the pool; values begin STEP behind them.
    real: bool ``[N]``; nothing is read for others.
    """
    at = pool + entries[:, None] + columns[None, :]
    mask = real[:, None] & (columns < D)[None, :]
    keys = tl.load(at, mask=mask, other=0.0)
    values = tl.load(at + STEP, mask=mask, other=0.0)
    return tl.dot(queries, tl.trans(keys), input_precision="ieee"), values


# These differ from step to step, and a program of its own for every kind of them would be compiled.
@triton.jit(do_not_specialize=["R", "S", "W"])
def _attend_tiles(
    q: tl.tensor,
    pool: tl.tensor,
    out: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    row_starts: tl.tensor,
    tables: tl.tensor,
    table_starts: tl.tensor,
    first: tl.tensor,
    seen: tl.tensor,
    node_slots: tl.tensor,
    node_starts: tl.tensor,
    ancestors: tl.tensor,
    R: int,
    S: int,
    W: int,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    TILE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    SEQUENCES: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """One tile's queries of one key/value head over one split; the first split takes the nodes, too."""
    head, split = tl.program_id(1), tl.program_id(2)
    sequence, first_row = _sequence_of(tl.program_id(0), row_starts, S, TILE_ROWS, SEQUENCES)
    stop_row = tl.load(row_starts + sequence + 1).to(tl.int32)
    if first_row >= stop_row:
        return

    # The queries of a tile: row by row, and in a row the heads that share this key/value head.
    Q: tl.constexpr = H // G
    member = tl.arange(0, TILE)
    row = first_row + member // Q
    real = (member < TILE_ROWS * Q) & (row < stop_row)
    begins = tl.load(first + row, mask=real, other=2147483647).to(tl.int32)
    ends = tl.load(seen + row, mask=real, other=0).to(tl.int32)
    lowest = tl.maximum(tl.min(begins), split * SPLIT)
    begin = lowest // CHUNK * CHUNK
    end = tl.minimum(tl.max(ends), split * SPLIT + SPLIT)
    if (split > 0) & (begin >= end):
        return

    columns, lanes = tl.arange(0, WIDTH), tl.arange(0, CHUNK)
    query = row.to(tl.int64) * H + head * Q + member % Q
    mask = real[:, None] & (columns < D)[None, :]
    queries = tl.load(q + query[:, None] * D + columns[None, :], mask=mask, other=0.0)
    STEP: tl.constexpr = G * D
    keys = pool + head * D
    top = tl.full((TILE,), -float("inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    result = tl.zeros((TILE, WIDTH), tl.float32)

    table = tables + tl.load(table_starts + sequence)
    for start in range(begin, end, CHUNK):
        positions = start + lanes
        # Behind the window there may be no block any more.
        there = (positions >= lowest) & (positions < end)
        blocks = tl.load(table + positions // B, mask=there, other=0).to(tl.int64)
        entries = (blocks * B + positions % B) * (2 * STEP)
        scores, values = _scores(queries, keys, entries, there, columns, D, STEP)
        seen_by = (positions[None, :] >= begins[:, None]) & (positions[None, :] < ends[:, None])
        scores = tl.where(seen_by & there[None, :], scores, -float("inf"))
        top, total, result = attend_chunk(top, total, result, scores, values)

    if split == 0:
        first_node = tl.load(node_starts + sequence).to(tl.int32)
        count = tl.load(node_starts + sequence + 1).to(tl.int32) - first_node
        for start in range(0, count, CHUNK):
            nodes = start + lanes
            there = nodes < count
            slots = tl.load(node_slots + first_node + nodes, mask=there, other=0).to(tl.int64)
            entries = slots * (2 * STEP)
            scores, values = _scores(queries, keys, entries, there, columns, D, STEP)
            words = ancestors + row[:, None] * W + nodes[None, :] // 32
            bits = tl.load(words, mask=real[:, None] & there[None, :], other=0) >> (nodes[None, :] % 32)
            scores = tl.where((bits & 1) != 0, scores, -float("inf"))
            top, total, result = attend_chunk(top, total, result, scores, values)

    if WHOLE:
        result = result / tl.where(total == 0.0, 1.0, total)[:, None]
    else:
        query += split.to(tl.int64) * R * H
        tl.store(tops + query, top, mask=real)
        tl.store(totals + query, total, mask=real)
    at = out + query[:, None] * D + columns[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=mask)
