"""Weights of a model folder, read tensor by tensor, or only the slice that a rank needs.

Only safetensors are read: pickled checkpoints can run code when they are opened.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from outrider.speculation.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_PATTERNS = ("pytorch_model*.bin", "*.pt", "*.pth")


class Checkpoint:
    """The tensors of one model folder.

    Opening it maps every file and reads the headers, so a missing or truncated shard is
    found at once; the tensors themselves are read when they are asked for.

    Raises:
        ModelNotFoundError: the folder has no weights at all.
        UnsupportedModelError: it has only pickled ones.
        CheckpointError: a file is damaged, or one that the index names is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        for path in _weight_files(folder):
            file = _open(path)
            self._files.update(dict.fromkeys(file.keys(), file))

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._files)

    def has(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor, from the header alone.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self._files:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        return tuple(self._files[name].get_slice(name).get_shape())

    def tensor(
        self, name: str, shape: tuple[int, ...], *, rows: slice | None = None, columns: slice | None = None
    ) -> Tensor:
        """The tensor in its saved dtype, on the CPU; with ``rows`` (dimension 0) or ``columns``
        (dimension 1) only that part of it is read.

        Args:
            name: as in the file, e.g. ``model.norm.weight``.
            shape: what the whole tensor must have, whatever part of it is read.
            rows: start and stop in dimension 0.
            columns: start and stop in dimension 1.

        Raises:
            CheckpointError: there is no such tensor, or it has another shape.
        """
        found = self.shape(name)
        if found != shape:
            raise CheckpointError(f"{self.folder}: tensor {name} has shape {found}, its model needs {shape}")
        parts = (rows or slice(None),) if columns is None else (rows or slice(None), columns)
        part: Tensor = self._files[name].get_slice(name)[parts]
        return part


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    if index.exists():
        return [_shard(folder, name) for name in _shard_names(index)]
    if not folder.is_dir():
        raise ModelNotFoundError(f"there is no model folder {folder}")
    pickles = sorted(path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern))
    if pickles:
        raise UnsupportedModelError(
            f"{folder} has only pickled weights ({pickles[0]}), which are refused: safetensors only"
        )
    raise ModelNotFoundError(f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def _shard_names(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of shards: {error!r}") from None


def _shard(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise CheckpointError(f"{folder} lacks the shard {name} that {INDEX_FILE} names")
    return folder / name


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file: {error}") from None
