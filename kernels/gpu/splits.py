"""What both attention kernels share: softmax taken chunk by chunk, and the merging of splits.

Positions are cut into splits at multiples of ``SPLIT``, which are attended side by side, so that few
rows over a long text fill a device; a second kernel merges a row's splits, always in their order.
"""

import torch
import triton
import triton.language as tl

SPLIT = 256
"""Positions that one program attends, at least; a multiple of every chunk."""
_CHUNK_BYTES = 2**15
"""Keys and values of one chunk; two of them are on the way, and shared memory is some 100 KB."""


def chunk_of(pool: torch.Tensor, width: int) -> int:
    """Keys taken at once, given the head size rounded up to a power of two; nothing else decides it."""
    return max(16, min(64, _CHUNK_BYTES // (2 * width * pool.itemsize)))


class Parts:
    """What splits leave behind for the merge, in float32.

    values: ``[splits, R, H, D]``, sums of weighted values. tops: ``[splits, R, H]``, the highest
    scores, which weights are relative to. totals: ``[splits, R, H]``, sums of weights.
    """

    def __init__(self, q: torch.Tensor, splits: int, split: int = SPLIT) -> None:
        """split: positions of each."""
        self._split = split
        self.values = q.new_empty((splits, *q.shape), dtype=torch.float32)
        self.tops, self.totals = q.new_empty((2, splits, *q.shape[:2]), dtype=torch.float32)

    def merged(
        self, out: torch.Tensor, first: torch.Tensor, stop: torch.Tensor, *, nodes_in_first: bool
    ) -> torch.Tensor:
        """``out`` ``[R, H, D]``, filled with the results of rows that attended positions ``[first, stop)``.

        nodes_in_first: the first split holds keys for every row, whatever its positions.
        """
        R, H, D = out.shape
        _merge[(R, H)](
            self.values,
            self.tops,
            self.totals,
            first,
            stop,
            out,
            D=D,
            WIDTH=triton.next_power_of_2(D),
            SPLIT=self._split,
            NODES_IN_FIRST=nodes_in_first,
            num_warps=1,
        )
        return out


@triton.jit
def attend_chunk(
    top: tl.tensor,
    total: tl.tensor,
    result: tl.tensor,
    scores: tl.tensor,
    values: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Takes one chunk of keys into the running softmax of M queries.

    top, total: ``[M]``. result: ``[M, D]``. scores: ``[M, N]``, -inf where a key is hidden.
    values: ``[N, D]``.

    Products of float32 are never taken in TF32, which would keep ten bits of each number.
    """
    higher = tl.maximum(top, tl.max(scores, 1))
    # A query that has seen no key yet must not subtract an infinity from another.
    base = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp(scores - base[:, None])
    kept = tl.exp(top - base)
    product = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return higher, total * kept + tl.sum(weights, 1), result * kept[:, None] + product


@triton.jit
def _take_split(
    top: tl.tensor,
    total: tl.tensor,
    result: tl.tensor,
    values: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    index: tl.tensor,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Takes the part at ``index`` into ``result`` ``[D]``."""
    part_top = tl.load(tops + index)
    higher = tl.maximum(top, part_top)
    base = tl.where(higher == -float("inf"), 0.0, higher)
    kept, added = tl.exp(top - base), tl.exp(part_top - base)
    columns = tl.arange(0, WIDTH)
    part = tl.load(values + index * D + columns, mask=columns < D, other=0.0)
    return higher, total * kept + tl.load(totals + index) * added, result * kept + part * added


@triton.jit(do_not_specialize_on_alignment=["tops", "totals", "first", "stop"])
def _merge(
    values: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    first: tl.tensor,
    stop: tl.tensor,
    out: tl.tensor,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    NODES_IN_FIRST: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    rows = tl.num_programs(0)
    heads = tl.num_programs(1)
    own = row.to(tl.int64) * heads + tl.program_id(1)
    begin = tl.load(first + row).to(tl.int32) // SPLIT
    end = tl.cdiv(tl.load(stop + row).to(tl.int32), SPLIT)
    columns = tl.arange(0, WIDTH)
    top = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    result = tl.zeros((WIDTH,), tl.float32)
    if NODES_IN_FIRST:
        top, total, result = _take_split(top, total, result, values, tops, totals, own, D, WIDTH)
        begin = tl.maximum(begin, 1)
    # A row's own splits and no others: a longer neighbour must not change its bits.
    for split in range(begin, end):
        index = own + split * rows.to(tl.int64) * heads
        top, total, result = _take_split(top, total, result, values, tops, totals, index, D, WIDTH)
    result = result / tl.where(total == 0.0, 1.0, total)
    tl.store(out + own * D + columns, result.to(out.dtype.element_ty), mask=columns < D)
