"""Finds the compiled kernels, and says so once where there are none.

``OUTRIDER_CPU_KERNEL`` chooses an instruction set (``amx``, ``avx512_bf16``, ``avx512_vnni``, ``avx512``,
``avx2``, ``portable``) instead of the fastest one that this processor has; ``off`` does without.
"""

import logging
import os
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from outrider.kernels.native._batching import Batcher
    from outrider.kernels.native._linear import Packed
    from outrider.kernels.native._replication import Grafter, Tallier

VARIABLE = "OUTRIDER_CPU_KERNEL"
KINDS = {torch.bfloat16: 0, torch.float32: 1}
"""Dtypes with a native kernel, by their number in ``linear.cpp``."""


class UnknownKernelError(ValueError):
    """The environment asks for an instruction set that this processor does not have."""


@cache
def load() -> ModuleType | None:
    """The extension module, with its path selected; None if it was not built or is switched off.

    Raises:
        UnknownKernelError: see there.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "off":
        return None
    try:
        from outrider.kernels.native import _linear
    except ImportError:
        return None
    if wanted and wanted not in _linear.paths():
        raise UnknownKernelError(f"{VARIABLE}={wanted}: not off and none of {', '.join(_linear.paths())}")
    if wanted:
        _linear.select(wanted)
    return _linear


def pack(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    dtype: torch.dtype | None = None,
    scales: torch.Tensor | None = None,
) -> "Packed | None":
    """A copy of the weights as the native kernel streams them; None if it cannot take them.

    scales: float32 ``[out]``, of int8 weights for rows of ``dtype``.
    """
    dtype = dtype or weight.dtype
    if weight.device.type != "cpu" or dtype not in KINDS or not weight.numel():
        return None
    library = load()
    if library is None:
        notice()
        return None
    weight = weight.contiguous()
    offsets = None if bias is None else bias.float().contiguous()
    packed: Packed = library.Packed(
        weight.data_ptr(),
        KINDS[dtype],
        *weight.shape,
        0 if offsets is None else offsets.data_ptr(),
        0 if scales is None else scales.data_ptr(),
    )
    return packed


def layers(x: torch.Tensor) -> ModuleType | None:
    """What computes a decoder's rows of this device and dtype between its products, if anything does."""
    return _load_layers() if x.is_cpu and x.dtype in KINDS else None


@cache
def batcher(rows: type, block: int) -> "Batcher | None":
    """What lays out instances of this class over blocks of so many slots; None without the module.

    rows: see ``models/batch.Rows``.
    """
    if os.environ.get(VARIABLE) == "off":
        return None
    try:
        from outrider.kernels.native import _batching
    except ImportError:
        return None
    return _batching.Batcher(rows, block)


def grafter(
    message: type,
    tree: tuple[npt.NDArray[Any], ...],
    window: tuple[npt.NDArray[Any], ...],
    *,
    vocab_size: int,
    max_depth: int,
    smallest_score: float,
) -> "Grafter | None":
    """What places growth in these arrays, which must not be replaced; None without the module.

    message: the class of messages. tree: see ``TreeSlots.storage``. window: slots, births and
    positions by id, int64 ``[window]``. The rest limits what is placed.
    """
    module = _load_replication()
    if module is None:
        return None
    made: Grafter = module.Grafter(message, tree, window, vocab_size, max_depth, smallest_score)
    return made


def tallier(received: type, growth: type) -> "Tallier | None":
    """What sums up messages of these classes; None without the module."""
    module = _load_replication()
    return None if module is None else module.Tallier(received, growth)


@cache
def _load_layers() -> ModuleType | None:
    wanted = os.environ.get(VARIABLE, "")
    if wanted != "off":
        try:
            from outrider.kernels.native import _layers
        except ImportError:
            pass
        else:
            wanted = {"avx512_vnni": "avx512"}.get(wanted, wanted)  # nothing here multiplies bytes
            if wanted in _layers.paths():
                _layers.select(wanted)
            return _layers
    notice("attention and norms are")
    return None


@cache
def _load_replication() -> ModuleType | None:
    if os.environ.get(VARIABLE) != "off":
        try:
            from outrider.kernels.native import _replication
        except ImportError:
            pass
        else:
            return _replication
    notice("reconciliation is", "NumPy is used, which is")
    return None


@cache
def notice(what: str = "linear layers are", instead: str = "PyTorch's own are used, which are") -> None:
    """Says, once, what is computed without a native module."""
    why = f"switched off by {VARIABLE}" if os.environ.get(VARIABLE) == "off" else "not built"
    logging.getLogger(__name__).warning("native %s %s: %s slower", what, why, instead)
