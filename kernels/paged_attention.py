"""Attention over a paged KV pool for whole batches at once: what rows attend, and plain references.

R rows of S sequences, H query heads, G key/value heads, D head size, N slots, B slots to a block,
W words of a bitmask. Here everything is a tensor on the pool's device, so that nothing is copied
to it per layer. Two ways to say what a row attends, for two kernels of ``kernels/gpu``:

- ``TreeKeys``: rows of one sequence together, which share what they read; the fewest bytes;
- ``PagedPaths``: every row's own path, position by position; a row's bits depend on it alone.

A query head h attends key/value head ``h // (H // G)``.
"""

from dataclasses import dataclass

import torch

from outrider.kernels.path_attention import PathKeys


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeKeys:
    """What R rows attend, the rows of each sequence behind one another; int32 or int64.

    row_starts: ``[S + 1]``, where each sequence's rows begin, and R. tables: blocks of the
    sequences' texts, one table behind the other. table_starts: ``[S]``, where each begins.
    first, seen: ``[R]``; a row attends the positions ``[first, seen)`` of its sequence's text.
    node_slots: slots of the sequences' draft nodes, one sequence's behind the other's.
    node_starts: ``[S + 1]``.
    ancestors: int32 ``[R, W]``; bit ``j % 32`` of word ``j // 32`` says whether the row attends its
    sequence's node j. The row's own node is set, and a node that a window hides is not.
    longest: no row has a larger ``seen``.
    """

    row_starts: torch.Tensor
    tables: torch.Tensor
    table_starts: torch.Tensor
    first: torch.Tensor
    seen: torch.Tensor
    node_slots: torch.Tensor
    node_starts: torch.Tensor
    ancestors: torch.Tensor
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedPaths:
    """What R rows attend, each its own path; int32 or int64.

    tables: blocks of the texts, one table behind the other. table_starts: ``[R]``, where each
    row's begins. seen: ``[R]``; positions before it stand in the text, those from it on in nodes.
    nodes: slots of the nodes on the rows' paths, from the root downwards. node_starts: ``[R]``,
    where each row's begin. first, length: ``[R]``; a row attends the positions
    ``[first, length)``, of which ``[seen, length)`` are nodes.
    longest: no row has a larger ``length``.
    """

    tables: torch.Tensor
    table_starts: torch.Tensor
    seen: torch.Tensor
    nodes: torch.Tensor
    node_starts: torch.Tensor
    first: torch.Tensor
    length: torch.Tensor
    longest: int

    @classmethod
    def of(cls, keys: PathKeys, device: torch.device) -> "PagedPaths":
        """The same paths on a device."""
        length = torch.from_numpy(keys.seen + keys.node_starts[1:] - keys.node_starts[:-1])
        return cls(
            tables=torch.from_numpy(keys.tables).to(device),
            table_starts=torch.from_numpy(keys.table_starts).to(device),
            seen=torch.from_numpy(keys.seen).to(device),
            nodes=torch.from_numpy(keys.nodes).to(device),
            node_starts=torch.from_numpy(keys.node_starts[:-1]).to(device),
            first=torch.from_numpy(keys.first).to(device),
            length=length.to(device),
            longest=int(length.max()),
        )


def tree_attention_reference(q: torch.Tensor, pool: torch.Tensor, keys: TreeKeys, block: int) -> torch.Tensor:
    """Attention ``[R, H, D]`` in float64 of rotated and scaled ``q`` ``[R, H, D]``.

    pool: ``[N, 2, G, D]``, one layer's keys and values. A row that attends nothing gets zeros.
    """
    results = []
    for sequence, (start, stop) in enumerate(zip(keys.row_starts[:-1], keys.row_starts[1:], strict=True)):
        table = keys.tables[keys.table_starts[sequence] :]
        nodes = keys.node_slots[keys.node_starts[sequence] : keys.node_starts[sequence + 1]]
        for row in range(int(start), int(stop)):
            text = _text_slots(table, int(keys.first[row]), int(keys.seen[row]), block)
            path = nodes[_visible(keys.ancestors[row], len(nodes))]
            results.append(_attend(q[row], pool, torch.cat((text, path))))
    return torch.stack(results)


def paged_path_attention_reference(
    q: torch.Tensor, pool: torch.Tensor, keys: PagedPaths, block: int
) -> torch.Tensor:
    """Like ``tree_attention_reference``, every row over its own path."""
    results = []
    for row, (first, seen, length) in enumerate(zip(keys.first, keys.seen, keys.length, strict=True)):
        text = _text_slots(keys.tables[keys.table_starts[row] :], int(first), int(seen), block)
        start = int(keys.node_starts[row])
        path = keys.nodes[start : start + int(length - seen)][max(0, int(first - seen)) :]
        results.append(_attend(q[row], pool, torch.cat((text, path))))
    return torch.stack(results)


def _text_slots(table: torch.Tensor, first: int, seen: int, block: int) -> torch.Tensor:
    positions = torch.arange(first, max(first, seen), device=table.device)
    return table[positions // block] * block + positions % block


def _visible(words: torch.Tensor, count: int) -> torch.Tensor:
    """Bool ``[count]`` of the bits of int32 ``words``."""
    nodes = torch.arange(count, device=words.device)
    return (words[nodes // 32] >> (nodes % 32)) % 2 == 1


def _attend(q: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Attention ``[H, D]`` in float64 of one row over exactly these slots."""
    entries = pool[slots].double()
    grouped = q.double().view(pool.shape[2], -1, q.shape[-1])
    scores = torch.einsum("gqd,kgd->gqk", grouped, entries[:, 0])
    return torch.einsum("gqk,kgd->gqd", scores.softmax(-1), entries[:, 1]).view(q.shape)
