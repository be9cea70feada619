"""A decoder's step as one native call: what its parts compute one after the other, with the same bits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from outrider.kernels.linear import Linear
from outrider.kernels.native import library
from outrider.kernels.path_attention import PathAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer's, for rows of ``hidden`` numbers with H query heads and G key/value heads of D numbers.

    input_norm, post_norm: ``[hidden]``, in the linear layers' dtype. qkv: queries, keys and values, as
    ``PathAttention`` takes them. qk_norm: float32 ``[H + G, D]``, or None.
    """

    input_norm: torch.Tensor
    qkv: Linear
    qk_norm: torch.Tensor | None
    output: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """What comes before the layers and behind them.

    embedding: ``[tokens, hidden]``. norm: ``[hidden]``. head: from ``hidden`` to logits.
    """

    embedding: torch.Tensor
    norm: torch.Tensor
    head: Linear


class LayerStack:
    """A network whose weights stand in the native kernels' layout; ``of`` says whether they do.

    It calls the kernels that its parts would call, in their order. What a layer computes is written down in
    ``models/layers.Block``; a step saves what calling from Python costs, most of all when a target's weights
    have just been through the caches.
    """

    def __init__(self, layers: Sequence[LayerWeights], ends: Ends, eps: float) -> None:
        first = layers[0].input_norm
        linears, between = library.load(), library.layers(first)
        assert linears is not None
        assert between is not None
        # What addresses are taken of must live as long as they are used.
        self._layers, self._ends, self._dtype = tuple(layers), ends, first.dtype
        table, hidden = ends.embedding, layers[0].qkv.shape[1]
        whole = table.shape[1] == hidden and table.is_contiguous()
        if table.dtype is not self._dtype or not whole:
            raise ValueError(f"an embedding of {table.dtype} {tuple(table.shape)} for {self._dtype} {hidden}")
        self._native = linears.Stack(
            between.calls,
            library.KINDS[self._dtype],
            eps,
            tuple(map(_addresses, layers)),
            (table.data_ptr(), len(table), ends.norm.data_ptr(), ends.head.native),
        )

    @classmethod
    def of(cls, layers: Sequence[LayerWeights], ends: Ends, eps: float) -> "LayerStack | None":
        """The network in one call; None where not everything in it is native."""
        linears = [linear for each in layers for linear in (each.qkv, each.output, each.gate_up, each.down)]
        native = all(linear.native is not None for linear in (*linears, ends.head))
        between = library.layers(layers[0].input_norm)
        return cls(layers, ends, eps) if native and between is not None else None

    def __call__(
        self,
        tokens: torch.Tensor,
        wanted: slice | torch.Tensor,
        attention: PathAttention,
        pool: torch.Tensor,
    ) -> torch.Tensor:
        """Writes the rows' KV; returns logits ``[wanted, vocab]`` in the weights' dtype.

        tokens: int64 ``[R]``, contiguous. wanted: rows, ascending; int64 where they are not consecutive.
        pool: ``[layers, N, 2, G, D]``, contiguous, in the weights' dtype.

        Raises:
            IndexError: a token that has no embedding.
        """
        # The kernel gets bare addresses.
        if tokens.dtype is not torch.int64 or tokens.shape != (attention.rows,):
            raise ValueError(f"{tokens.dtype} {tuple(tokens.shape)} for {attention.rows} rows")
        if len(pool) != len(self._layers) or pool.dtype is not self._dtype:
            given = f"{len(pool)} {pool.dtype} layers"
            raise ValueError(f"a pool of {given} for {len(self._layers)} of {self._dtype}")
        if isinstance(wanted, slice):
            rows, first, count = 0, wanted.start, wanted.stop - wanted.start
        else:
            rows, first, count = wanted.data_ptr(), 0, len(wanted)
        logits = torch.empty(count, self._ends.head.shape[0], dtype=self._dtype)
        self._native(
            *attention.described,
            pool.data_ptr(),
            pool.stride(0),
            tokens.data_ptr(),
            rows,
            first,
            count,
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        return logits


def _addresses(layer: LayerWeights) -> tuple[object, ...]:
    return (
        layer.input_norm.data_ptr(),
        layer.qkv.native,
        0 if layer.qk_norm is None else layer.qk_norm.data_ptr(),
        layer.output.native,
        layer.post_norm.data_ptr(),
        layer.gate_up.native,
        layer.down.native,
    )
