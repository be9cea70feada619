"""Ragged batches of texts and draft trees in a paged KV pool, described in both ways that kernels take."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from outrider.kernels.paged_attention import PagedPaths, TreeKeys

BLOCK = 32


@dataclass(frozen=True, kw_only=True)
class Text:
    """A sequence of ``committed`` tokens, the last ``chunk`` of which are rows, and a tree below it.

    parents: by node, -1 for children of the last committed token. Every node is a row.
    """

    committed: int
    chunk: int = 1
    parents: Sequence[int] = field(default=())

    def paths(self) -> list[list[int]]:
        """By row, the nodes from the root down to its own."""
        paths: list[list[int]] = []
        for node, parent in enumerate(self.parents):
            paths.append([*(paths[parent] if parent >= 0 else []), node])
        return [[] for _ in range(self.chunk)] + paths


@dataclass(frozen=True, kw_only=True)
class PagedBatch:
    """Rows and their keys; slots that belong to nobody hold NaN.

    q: ``[R, H, D]``. pool: ``[N, 2, G, D]``. slots: by row, those it attends, in their order.
    """

    q: torch.Tensor
    pool: torch.Tensor
    tree: TreeKeys
    paths: PagedPaths
    slots: list[list[int]]


def chain(nodes: int) -> list[int]:
    return list(range(-1, nodes - 1))


def paged_batch(
    texts: Sequence[Text],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    window: int | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> PagedBatch:
    """shape: ``(H, G, D)``. window: how many positions a row attends at most, its own included."""
    generator = torch.Generator().manual_seed(seed)
    H, G, D = shape
    sizes = [-(-text.committed // BLOCK) for text in texts]
    arenas = [-(-len(text.parents) // BLOCK) for text in texts]
    total = sum(sizes) + sum(arenas) + 2
    blocks = torch.randperm(total, generator=generator).tolist()
    tables = [[blocks.pop() for _ in range(size)] for size in sizes]
    # Nodes are scattered over blocks, too, in no order.
    nodes = []
    for text, size in zip(texts, arenas, strict=True):
        slots = torch.tensor([blocks.pop() for _ in range(size)]).view(-1, 1) * BLOCK + torch.arange(BLOCK)
        order = torch.randperm(size * BLOCK, generator=generator)
        nodes.append(slots.view(-1)[order][: len(text.parents)].tolist())
    rows = [
        _row(text, row, path, tables[index], nodes[index], window)
        for index, text in enumerate(texts)
        for row, path in enumerate(text.paths())
    ]
    pool = torch.full((total * BLOCK, 2, G, D), torch.nan)
    used = sorted(
        {slot for table in tables for block in table for slot in _slots(block)} | set(_joined(nodes))
    )
    # The last block of a text is not full.
    for text, table in zip(texts, tables, strict=True):
        used = [slot for slot in used if slot not in _unfilled(text.committed, table)]
    pool[used] = torch.randn(len(used), 2, G, D, generator=generator)
    q = torch.randn(len(rows), H, D, generator=generator) * D**-0.5 * 2
    return PagedBatch(
        q=q.to(device, dtype),
        pool=pool.to(device, dtype),
        tree=_tree_keys(texts, rows, tables, nodes, device),
        paths=_paged_paths(texts, rows, tables, device),
        slots=[row.slots for row in rows],
    )


@dataclass(frozen=True, kw_only=True)
class _Row:
    first: int
    seen: int
    visible: list[int]
    path: list[int]
    slots: list[int]


def _row(
    text: Text, row: int, path: list[int], table: list[int], nodes: list[int], window: int | None
) -> _Row:
    seen = text.committed if path else text.committed - text.chunk + row + 1
    length = seen + len(path)
    first = 0 if window is None else max(0, length - window)
    slots = [table[p // BLOCK] * BLOCK + p % BLOCK for p in range(first, seen)]
    visible = path[max(0, first - seen) :]
    return _Row(
        first=first,
        seen=seen,
        visible=visible,
        path=[nodes[node] for node in path],
        slots=slots + [nodes[node] for node in visible],
    )


def _slots(block: int) -> range:
    return range(block * BLOCK, (block + 1) * BLOCK)


def _unfilled(committed: int, table: list[int]) -> range:
    return _slots(table[-1])[committed - (len(table) - 1) * BLOCK :] if table else range(0)


def _joined(parts: Sequence[list[int]]) -> list[int]:
    return [number for part in parts for number in part]


def _starts(parts: Sequence[Sequence[int]]) -> list[int]:
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + len(part))
    return starts


def _tree_keys(
    texts: Sequence[Text], rows: list[_Row], tables: list[list[int]], nodes: list[list[int]], device: str
) -> TreeKeys:
    words = -(-max(1, *(len(text.parents) for text in texts), 1) // 32)
    bits = torch.zeros(len(rows), words * 32, dtype=torch.int64)
    for index, row in enumerate(rows):
        bits[index, row.visible] = 1
    masks = (bits.view(len(rows), words, 32) << torch.arange(32)).sum(-1)
    return TreeKeys(
        row_starts=torch.tensor(_starts([text.paths() for text in texts]), device=device),
        tables=torch.tensor(_joined(tables), device=device, dtype=torch.int32),
        table_starts=torch.tensor(_starts(tables)[:-1], device=device),
        first=torch.tensor([row.first for row in rows], device=device, dtype=torch.int32),
        seen=torch.tensor([row.seen for row in rows], device=device),
        node_slots=torch.tensor(_joined(nodes), device=device, dtype=torch.int64),
        node_starts=torch.tensor(_starts(nodes), device=device),
        # The top bit of a word is the sign of an int32.
        ancestors=masks.to(torch.int32).to(device),
        longest=max(row.seen for row in rows),
    )


def _paged_paths(texts: Sequence[Text], rows: list[_Row], tables: list[list[int]], device: str) -> PagedPaths:
    starts = _starts(tables)
    lengths = [row.seen + len(row.path) for row in rows]
    return PagedPaths(
        tables=torch.tensor(_joined(tables), device=device, dtype=torch.int32),
        table_starts=torch.tensor(
            [starts[i] for i, text in enumerate(texts) for _ in text.paths()], device=device
        ),
        seen=torch.tensor([row.seen for row in rows], device=device),
        nodes=torch.tensor(_joined([row.path for row in rows]), device=device, dtype=torch.int64),
        node_starts=torch.tensor(_starts([row.path for row in rows])[:-1], device=device),
        first=torch.tensor([row.first for row in rows], device=device),
        length=torch.tensor(lengths, device=device),
        longest=max(lengths),
    )
