"""Writes a deeper model with the same predictions, to measure with weights that take real time.

    python -m outrider.models.inflate SRC OUT --parameters 120M | --layers N

Every appended block is executed in full and adds exactly zero to the residual stream: its
inner weights are random, the two projections that write to the stream are zero.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from outrider.models.config import ModelConfig, load_config
from outrider.models.resolve import TEXT_FILES
from outrider.models.weights import INDEX_FILE, SINGLE_FILE, Checkpoint
from outrider.speculation.errors import InvalidConfigError, OutriderError

FIRST_BLOCK = "model.layers.0."
WRITES_TO_STREAM = ("o_proj", "down_proj")
INIT_STD = 0.02
SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def inflate(
    source: Path, out: Path, *, parameters: int | None = None, layers: int | None = None, seed: int = 0
) -> ModelConfig:
    """Writes to ``out`` the model of ``source`` with more blocks, in the same dtype, as one file.

    Args:
        source: a Hugging Face folder.
        out: a folder that is new or empty.
        parameters: the depth becomes the smallest that has at least this many parameters
            (a tied head is no parameter of its own).
        layers: the depth itself; exactly one of the two is given.
        seed: of the appended weights.

    Returns:
        The configuration of the written model.

    Raises:
        InvalidConfigError: both or neither size is given, the size is below the source's, or
            ``out`` is not empty.
        ModelError: the source cannot be read.
    """
    config = load_config(source)
    checkpoint = Checkpoint(source)
    depth = _depth(config, checkpoint, parameters, layers)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidConfigError(f"{out} is not an empty folder, and nothing is overwritten")
    tensors = {name: _read(checkpoint, name) for name in _kept_names(config, checkpoint)}
    tensors |= _appended_blocks(checkpoint, range(config.num_layers, depth), seed)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / SINGLE_FILE, metadata={"format": "pt"})
    _copy_text_files(source, out)
    _write_config(source, out, depth)
    return load_config(out)


@contextmanager
def inflated(source: Path, parameters: int | None) -> Iterator[Path]:
    """A folder with the model of so many parameters, for as long as it is needed; see ``inflate``.

    parameters: None leaves the model as it is.
    """
    if parameters is None:
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="outrider-inflated-") as folder:
        out = Path(folder) / source.name
        inflate(source, out, parameters=parameters)
        yield out


def count_parameters(config: ModelConfig, checkpoint: Checkpoint) -> int:
    """Number of weights in the checkpoint; a tied head is counted once, as the embedding."""
    return sum(prod(checkpoint.shape(name)) for name in _kept_names(config, checkpoint))


def parse_count(text: str) -> int:
    """Reads ``120M``, ``1.5B``, ``4096`` and the like.

    Raises:
        InvalidConfigError: the text is no such number.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip().upper())
    if match is None:
        raise InvalidConfigError(f"{text!r} is no number of parameters such as 120M or 1.5B")
    return round(float(match[1]) * SUFFIXES[match[2]])


def _depth(config: ModelConfig, checkpoint: Checkpoint, parameters: int | None, layers: int | None) -> int:
    if (parameters is None) == (layers is None):
        raise InvalidConfigError(
            f"exactly one of parameters ({parameters}) and layers ({layers}) must be given"
        )
    if layers is not None:
        if layers < config.num_layers:
            raise InvalidConfigError(f"layers={layers} is below the source's {config.num_layers}")
        return layers
    assert parameters is not None
    present = count_parameters(config, checkpoint)
    if parameters < present:
        raise InvalidConfigError(f"parameters={parameters} is below the source's {present}")
    per_block = sum(prod(checkpoint.shape(name)) for name in _block_names(checkpoint))
    return config.num_layers + ceil((parameters - present) / per_block)


def _kept_names(config: ModelConfig, checkpoint: Checkpoint) -> list[str]:
    """All tensors but those that follow from others: a tied head, old checkpoints' frequencies."""
    tied_head = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return [name for name in checkpoint.names() if name not in tied_head and "rotary_emb" not in name]


def _block_names(checkpoint: Checkpoint) -> list[str]:
    return [name for name in checkpoint.names() if name.startswith(FIRST_BLOCK) and "rotary_emb" not in name]


def _read(checkpoint: Checkpoint, name: str) -> Tensor:
    return checkpoint.tensor(name, checkpoint.shape(name))


def _appended_blocks(checkpoint: Checkpoint, indices: range, seed: int) -> dict[str, Tensor]:
    """New blocks shaped like the first one."""
    generator = torch.Generator().manual_seed(seed)
    examples = {name: _read(checkpoint, name) for name in _block_names(checkpoint)}
    return {
        name.replace(FIRST_BLOCK, f"model.layers.{index}.", 1): _appended_tensor(name, example, generator)
        for index in indices
        for name, example in examples.items()
    }


def _appended_tensor(name: str, example: Tensor, generator: torch.Generator) -> Tensor:
    if "norm" in name:
        return torch.ones_like(example)
    if any(part in name for part in WRITES_TO_STREAM):
        return torch.zeros_like(example)
    return torch.normal(0.0, INIT_STD, tuple(example.shape), generator=generator).to(example.dtype)


def _copy_text_files(source: Path, out: Path) -> None:
    """Tokenizer, chat template and generation defaults; not what describes the weights."""
    for pattern in TEXT_FILES:
        for path in source.glob(pattern):
            if path.name not in ("config.json", INDEX_FILE):
                shutil.copy(path, out / path.name)


def _write_config(source: Path, out: Path, depth: int) -> None:
    raw: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    raw["num_hidden_layers"] = depth
    if raw.get("layer_types"):
        raw["layer_types"] = ["full_attention"] * depth
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for a bad argument or model."""
    parser = argparse.ArgumentParser(prog="outrider.models.inflate", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("out", type=Path, metavar="OUT")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--parameters", metavar="N", help="at least so many, e.g. 120M")
    size.add_argument("--layers", type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        parameters = None if given.parameters is None else parse_count(given.parameters)
        config = inflate(given.source, given.out, parameters=parameters, layers=given.layers, seed=given.seed)
    except OutriderError as error:
        print(f"inflate: {error}", file=sys.stderr)
        return 2
    total = count_parameters(config, Checkpoint(given.out))
    print(f"{given.out}: {config.num_layers} layers, {total:,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
