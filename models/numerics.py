"""Row classes: how many rows a product must have so that each row gets the same bits.

A matrix product may reduce a row in another order when other rows stand beside it. Which row
counts are safe depends on shape, dtype, threads and library, so it is found out at start-up:
a quantum is taken when rows agree bitwise in all products padded to its multiples.
"""

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from outrider.kernels.linear import Linear
from outrider.kernels.tree_attention import STRIDE, TAIL, AttentionGroup, Scratch, TreeAttention
from outrider.models.parallel import TensorParallel
from outrider.speculation.errors import ModelError

MAX_ROWS = 64
"""Rows of the largest forward; longer prompts go in chunks. Classes are probed for no more."""
MAX_DEVICE_ROWS = 2048
"""The same on a device with ``fast``, where nothing has to be probed."""
MAX_TAIL = 256
"""Nodes that rows of one sequence may attend together; draft trees hold no more."""
QUANTA = (1, 2, 4, 8, 16, 32, MAX_ROWS)
DRAWS = 4
"""Random inputs that each linear layer is probed with: rare roundings hide from one of them."""
PROBED_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 20, 24, 31, 32, 33, 40, 48, 56, 63, 64)


class Numerics(enum.StrEnum):
    """``canonical``: a row's bits depend on its path alone. ``fast``: fewest operations."""

    CANONICAL = "canonical"
    FAST = "fast"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowClasses:
    """Quanta of rows for linear layers and for attention's products over shared keys.

    by_path: attention goes through each row's path by itself and needs no class.
    by_tree: it reads what a sequence's rows share once, with a bitmask of each row's nodes.
    """

    canonical: bool
    linear: int = 1
    attention: int = 1
    by_path: bool = False
    by_tree: bool = False

    @property
    def max_rows(self) -> int:
        """Rows of the largest forward."""
        return MAX_DEVICE_ROWS if self.by_tree else MAX_ROWS

    def linear_rows(self, rows: int) -> int:
        return -(-rows // self.linear) * self.linear

    def attention_rows(self, rows: int) -> int:
        return -(-rows // self.attention) * self.attention


Product = Callable[[int, int, int], torch.Tensor]
"""``(first, count, quantum)``: rows ``[first, first + count)`` of one fixed input, computed
together with as many further rows as fill up a multiple of the quantum."""


def smallest_quantum(product: Product, name: str) -> int:
    """The smallest quantum with which rows agree bitwise however many are computed.

    Raises:
        ModelError: not even full forwards agree with themselves.
    """
    reference = product(0, MAX_ROWS, MAX_ROWS)
    for quantum in QUANTA:
        if all(_agrees(product, reference, rows, quantum) for rows in PROBED_ROWS):
            return quantum
    raise ModelError(f"{name}: no row class gives reproducible results; use numerics 'fast'")


def _agrees(product: Product, reference: torch.Tensor, rows: int, quantum: int) -> bool:
    """Whether ``rows`` rows, taken from the front and from the back, equal the reference's."""
    last = MAX_ROWS - rows
    return torch.equal(product(0, rows, quantum), reference[:rows]) and torch.equal(
        product(last, rows, quantum), reference[last:]
    )


def probe(
    linears: Iterable[Linear],
    *,
    heads: tuple[int, int, int],
    max_keys: int,
    dtype: torch.dtype,
    attention_dtype: torch.dtype,
    by_path: bool,
    device: torch.device,
) -> RowClasses:
    """Row classes for these linear layers and for attention of shape ``heads`` = (G, Q, D)."""
    generator = torch.Generator().manual_seed(0)
    distinct = {(linear.shape, linear.packed): linear for linear in linears}
    linear_quanta = [
        _linear_quantum(linear, dtype, generator, device)
        for linear in distinct.values()
        for _ in range(DRAWS)
    ]
    if by_path:
        return RowClasses(canonical=True, linear=max(linear_quanta), by_path=True)
    longest = max(0, max_keys // STRIDE - 1) * STRIDE
    key_counts = sorted({0, min(STRIDE, longest), min(7 * STRIDE, longest), longest})
    attention_quanta = [_attention_quantum(heads, S, attention_dtype, generator) for S in key_counts]
    return RowClasses(canonical=True, linear=max(linear_quanta), attention=max(attention_quanta))


def agreed(own: RowClasses, ranks: TensorParallel) -> RowClasses:
    """The classes that suit every rank: quanta are powers of two, so the greatest is a multiple of all.

    Raises:
        ModelError: some ranks have the native attention and some do not.
    """
    linear, attention, some, others = ranks.maximum((own.linear, own.attention, own.by_path, not own.by_path))
    if some and others:
        raise ModelError(f"the native attention was built for some of the {ranks.size} ranks and not for all")
    return replace(own, linear=linear, attention=attention)


def _linear_quantum(
    linear: Linear, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> int:
    x = torch.randn(MAX_ROWS, linear.shape[1], generator=generator).to(device, dtype)

    def product(first: int, count: int, quantum: int) -> torch.Tensor:
        padded = x.new_zeros(-(-count // quantum) * quantum, x.shape[1])
        padded[:count] = x[first : first + count]
        return linear(padded)[:count]

    return smallest_quantum(product, f"linear {linear.shape}")


def _attention_quantum(
    heads: tuple[int, int, int], S: int, dtype: torch.dtype, generator: torch.Generator
) -> int:
    G, Q, D = heads
    pool = torch.randn(S + TAIL, 2, G, D, generator=generator).to(dtype)
    q = torch.randn(MAX_ROWS, G, Q, D, generator=generator).to(dtype)
    scratch = Scratch(MAX_ROWS, heads, S + TAIL, dtype)

    def product(first: int, count: int, quantum: int) -> torch.Tensor:
        group = AttentionGroup(
            rows=None,
            num_rows=count,
            padded=-(-count // quantum) * quantum,
            shared=torch.arange(S),
            tail_slots=torch.arange(S, S + TAIL).repeat(count),
            tail_mask=torch.zeros(count, 1, TAIL, dtype=dtype),
        )
        out = torch.empty(count, G, Q, D, dtype=dtype)
        attention = TreeAttention([group], heads, scratch, rows=count, canonical=True)
        attention(q[first : first + count], pool, out)
        return out

    return smallest_quantum(product, f"attention {heads} over {S} keys")
