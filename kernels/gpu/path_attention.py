"""Attention whose bits depend on a row's path alone: every row by itself, key by key in order.

A program attends one split of one row. Chunks and splits begin at multiples of constants, a
key's place in them is its position, and a row's splits are merged in their order: neither other rows
nor slots nor the difference between text and nodes enters into the sums. The compiler gets no size
that differs between calls, nor where in memory the keys' description begins, and there is no shorter
way for short texts: one program computes every row.
"""

import torch
import triton
import triton.language as tl

from outrider.kernels.gpu.splits import SPLIT, Parts, attend_chunk, chunk_of
from outrider.kernels.paged_attention import PagedPaths


def path_attention(
    q: torch.Tensor, pool: torch.Tensor, keys: PagedPaths, block: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention ``[R, H, D]`` in q's dtype, in ``out`` if that is given.

    See ``paged_path_attention_reference``. q, pool, out: contiguous, of one dtype: bfloat16, float16 or
    float32. Sums are float32.
    """
    (R, H, D), G = q.shape, pool.shape[2]
    width = triton.next_power_of_2(D)
    splits = max(1, triton.cdiv(keys.longest, SPLIT))
    parts = Parts(q, splits)
    _attend_paths[(R, G, splits)](
        q,
        pool,
        parts.values,
        parts.tops,
        parts.totals,
        keys.tables,
        keys.table_starts,
        keys.seen,
        keys.nodes,
        keys.node_starts,
        keys.first,
        keys.length,
        H=H,
        G=G,
        D=D,
        B=block,
        HEADS=max(16, triton.next_power_of_2(H // G)),
        CHUNK=chunk_of(pool, width),
        WIDTH=width,
        SPLIT=SPLIT,
        num_warps=4,
        num_stages=2,
    )
    out = torch.empty_like(q) if out is None else out
    return parts.merged(out, keys.first, keys.length, nodes_in_first=False)


@triton.jit(
    do_not_specialize_on_alignment=[
        *("tables", "table_starts", "seen", "nodes", "node_starts", "first", "length", "tops", "totals"),
    ]
)
def _attend_paths(
    q: tl.tensor,
    pool: tl.tensor,
    parts: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    tables: tl.tensor,
    table_starts: tl.tensor,
    seen: tl.tensor,
    nodes: tl.tensor,
    node_starts: tl.tensor,
    first: tl.tensor,
    length: tl.tensor,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    stop = tl.load(length + row).to(tl.int32)
    earliest = tl.load(first + row).to(tl.int32)
    begin = tl.maximum(earliest, split * SPLIT) // CHUNK * CHUNK
    end = tl.minimum(stop, split * SPLIT + SPLIT)
    if begin >= end:
        return

    Q: tl.constexpr = H // G
    STEP: tl.constexpr = G * D
    columns, lanes = tl.arange(0, WIDTH), tl.arange(0, CHUNK)
    member = tl.arange(0, HEADS)
    query = row.to(tl.int64) * H + head * Q + member
    inside = (columns < D)[None, :]
    mask = (member < Q)[:, None] & inside
    queries = tl.load(q + query[:, None] * D + columns[None, :], mask=mask, other=0.0)
    top = tl.full((HEADS,), -float("inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    result = tl.zeros((HEADS, WIDTH), tl.float32)

    committed = tl.load(seen + row).to(tl.int32)
    table = tables + tl.load(table_starts + row)
    path = nodes + tl.load(node_starts + row)
    for start in range(begin, end, CHUNK):
        positions = start + lanes
        there = (positions >= earliest) & (positions < end)
        in_text = positions < committed
        blocks = tl.load(table + positions // B, mask=there & in_text, other=0).to(tl.int64)
        below = tl.load(path + (positions - committed), mask=there & (positions >= committed), other=0)
        slots = tl.where(in_text, blocks * B + positions % B, below.to(tl.int64))
        at = pool + head * D + (slots * (2 * STEP))[:, None] + columns[None, :]
        keys = tl.load(at, mask=there[:, None] & inside, other=0.0)
        values = tl.load(at + STEP, mask=there[:, None] & inside, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        scores = tl.where(there[None, :], scores, -float("inf"))
        top, total, result = attend_chunk(top, total, result, scores, values)

    query += split.to(tl.int64) * tl.num_programs(0) * H
    tl.store(tops + query, top, mask=member < Q)
    tl.store(totals + query, total, mask=member < Q)
    tl.store(parts + query[:, None] * D + columns[None, :], result, mask=mask)
