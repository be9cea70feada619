"""What the leader of a tensor-parallel target has the other ranks do, as plain numbers.

A message is int64 ``[N]``: steps one behind the other, each as its kind, the number of its arrays, their
lengths and the arrays. Nothing that could run code is ever read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.paged_attention import TreeKeys
from outrider.kernels.path_attention import PathKeys
from outrider.kernels.tree_attention import AttentionGroup
from outrider.models.batch import Attended, Batch

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Forward:
    """Run these rows."""

    batch: Batch


@dataclass(frozen=True, slots=True)
class Move:
    """Copy KV entries from slots to slots; int64 ``[entries]`` each."""

    source: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True, slots=True)
class Measure:
    """Say how much of the device is left beside a step of so many rows."""

    rows: int


@dataclass(frozen=True, slots=True)
class MakeCache:
    """Make the cache that the following steps work on."""

    num_blocks: int


@dataclass(frozen=True, slots=True)
class Stop:
    """There are no more steps."""


Step: TypeAlias = Forward | Move | Measure | MakeCache | Stop
_KINDS: tuple[type[Step], ...] = (Forward, Move, Measure, MakeCache, Stop)


def encode(steps: Sequence[Step]) -> IntArray:
    """The message that says to do these, one after the other."""
    parts: list[IntArray] = []
    for step in steps:
        arrays = _arrays(step)
        parts.append(np.array([_KINDS.index(type(step)), len(arrays), *map(len, arrays)], np.int64))
        parts += arrays
    return np.concatenate(parts)


def decode(message: IntArray, score_dtype: torch.dtype) -> Iterator[Step]:
    """The steps of a message; ``score_dtype`` is that of the network's attention."""
    start = 0
    while start < len(message):
        kind, count = message[start : start + 2]
        lengths = message[start + 2 : start + 2 + count]
        *arrays, _ = np.split(message[start + 2 + count :], np.cumsum(lengths))
        yield _step(_KINDS[kind], arrays, score_dtype)
        start += 2 + count + int(lengths.sum())


def _arrays(step: Step) -> list[IntArray]:
    match step:
        case Forward(batch):
            rows = [each.numpy() for each in (batch.tokens, batch.positions, batch.slots)]
            return [*rows, *_wanted(batch.logit_rows), *_attended(batch.attended)]
        case Move(source, target):
            return [source.numpy(), target.numpy()]
        case MakeCache(number) | Measure(number):
            return [np.array([number])]
        case Stop():
            return []


def _step(kind: type[Step], arrays: Sequence[IntArray], score_dtype: torch.dtype) -> Step:
    if kind is Forward:
        return Forward(_batch(arrays, score_dtype))
    if kind is Move:
        source, target = map(torch.from_numpy, arrays)
        return Move(source, target)
    if kind is MakeCache or kind is Measure:
        return kind(int(arrays[0][0]))
    return Stop()


def _batch(arrays: Sequence[IntArray], score_dtype: torch.dtype) -> Batch:
    tokens, positions, slots, consecutive, wanted, form, *attended = arrays
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        attended=_read_attended(int(form[0]), attended, score_dtype),
        logit_rows=slice(*wanted.tolist()) if len(consecutive) else torch.from_numpy(wanted),
    )


_NO: IntArray = np.zeros(0, np.int64)
_YES: IntArray = np.ones(1, np.int64)
_GROUPS, _PATHS, _TREES = range(3)
"""What a batch attends."""
_PATH_KEYS = [field.name for field in fields(PathKeys)]
_TREE_KEYS = [field.name for field in fields(TreeKeys) if field.name not in ("ancestors", "longest")]


def _wanted(rows: slice | torch.Tensor) -> list[IntArray]:
    """Whether they are consecutive, and first and stop or all of them."""
    if isinstance(rows, slice):
        return [_YES, np.array([rows.start, rows.stop])]
    return [_NO, rows.numpy()]


def _attended(attended: Attended) -> list[IntArray]:
    """The form, and its arrays: five of each group.

    Those of devices, too, are laid out on the host, and each rank brings them to its own.
    """
    if isinstance(attended, PathKeys):
        return [np.array([_PATHS]), *(getattr(attended, name) for name in _PATH_KEYS)]
    if isinstance(attended, TreeKeys):
        words = attended.ancestors.numpy()
        sizes = np.array([attended.longest, words.shape[1]])
        arrays = (getattr(attended, name).numpy() for name in _TREE_KEYS)
        return [np.array([_TREES]), *arrays, words.reshape(-1).astype(np.int64), sizes]
    assert isinstance(attended, list), "a batch that stands on a device already"
    return [np.array([_GROUPS]), *(array for group in attended for array in _of_group(group))]


def _read_attended(form: int, arrays: Sequence[IntArray], score_dtype: torch.dtype) -> Attended:
    if form == _PATHS:
        return PathKeys(**dict(zip(_PATH_KEYS, arrays, strict=True)))
    if form == _TREES:
        *keys, words, sizes = arrays
        longest, per_row = sizes.tolist()
        return TreeKeys(
            **{name: torch.from_numpy(each) for name, each in zip(_TREE_KEYS, keys, strict=True)},
            ancestors=torch.from_numpy(words.astype(np.int32)).view(-1, per_row),
            longest=longest,
        )
    return [_group(arrays[at : at + 5], score_dtype) for at in range(0, len(arrays), 5)]


def _of_group(group: AttentionGroup) -> list[IntArray]:
    everyone = group.rows is None
    numbers = [group.num_rows, group.padded, everyone]
    rows = _NO if group.rows is None else group.rows.numpy()
    visible = (group.tail_mask == 0).flatten().long().numpy()
    slots = [group.shared.numpy(), group.tail_slots.numpy()]
    return [np.array(numbers, np.int64), rows, *slots, visible]


def _group(arrays: Sequence[IntArray], score_dtype: torch.dtype) -> AttentionGroup:
    numbers, rows, shared, tail_slots, visible = arrays
    num_rows, padded, everyone = numbers.tolist()
    mask = torch.from_numpy(np.where(visible, 0.0, -np.inf)).to(score_dtype)
    return AttentionGroup(
        rows=None if everyone else torch.from_numpy(rows),
        num_rows=num_rows,
        padded=padded,
        shared=torch.from_numpy(shared),
        tail_slots=torch.from_numpy(tail_slots),
        tail_mask=mask.view(num_rows, 1, -1),
    )
