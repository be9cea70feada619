"""Attention of one layer as a decoder block asks for it, from projected heads to attended values."""

from typing import Protocol

import torch
import torch.nn.functional as F

from outrider.kernels.paged_attention import PagedPaths, TreeKeys
from outrider.kernels.tree_attention import TreeAttention
from outrider.models.block_pool import BLOCK
from outrider.models.kernel_set import PagedKernels


class Attention(Protocol):
    """One step's attention, used by every layer; see ``PathAttention``."""

    def __call__(
        self,
        heads: torch.Tensor,
        norm: torch.Tensor | None,
        eps: float,
        pool: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """heads: ``[R, (H + 2 G) * D]``, contiguous. norm: ``[H + G, D]``. pool: ``[N, 2, G, D]``.

        out: ``[R, H * D]``, filled in place.
        """


class SharedAttention:
    """With PyTorch's products, over keys that rows share.

    shape: ``(G, Q, D)``. rotation: complex ``[R, H + G, D / 2]``, queries' part scaled by
    1/sqrt(D). slots: int64 ``[R]``, where keys and values go.
    """

    def __init__(
        self,
        attend: TreeAttention,
        shape: tuple[int, int, int],
        *,
        rotation: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        self._attend, self._shape, self._rotation, self._slots = attend, shape, rotation, slots

    def __call__(
        self,
        heads: torch.Tensor,
        norm: torch.Tensor | None,
        eps: float,
        pool: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """See ``Attention``."""
        rows, (G, Q, D) = len(heads), self._shape
        H = G * Q
        heads = heads.to(pool.dtype).view(rows, H + 2 * G, D)
        if norm is not None:
            heads[:, : H + G] = F.rms_norm(heads[:, : H + G], (D,), None, eps) * norm
        pairs = heads[:, : H + G].view(rows, H + G, D // 2, 2)
        torch.view_as_complex(pairs).mul_(self._rotation)
        pool.index_copy_(0, self._slots, heads[:, H:].view(rows, 2, G, D))
        self._attend(heads[:, :H].view(rows, G, Q, D), pool, out.view(rows, G, Q, D))


class PagedAttention:
    """On a device: one kernel norms, rotates and writes, others attend.

    turns: complex64 ``[R, 2, D / 2]``, of queries (scaled by 1/sqrt(D)) and of keys.
    slots: ``[R]``, where keys and values go.
    """

    def __init__(
        self,
        kernels: PagedKernels,
        keys: PagedPaths | TreeKeys,
        *,
        turns: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        self._kernels, self._keys, self._turns, self._slots = kernels, keys, turns, slots

    def __call__(
        self,
        heads: torch.Tensor,
        norm: torch.Tensor | None,
        eps: float,
        pool: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """See ``Attention``."""
        kernels, keys = self._kernels, self._keys
        q = kernels.rotate_and_write(heads, norm, eps, self._turns, self._slots, pool)
        if isinstance(keys, PagedPaths):
            kernels.over_paths(q, pool, keys, BLOCK, out.view(q.shape))
        else:
            kernels.over_trees(q, pool, keys, BLOCK, out.view(q.shape))
