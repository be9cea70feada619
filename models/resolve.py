"""From what a user calls a model, a path or a hub id, to the folder with its files."""

import os
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from outrider.speculation.errors import ModelNotFoundError

TEXT_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
"""Configuration, tokenizer and chat template; never code or pickles."""

ALLOWED = (*TEXT_FILES, "*.safetensors")
IGNORED = ("*/*", "consolidated*")
"""Subfolders and ``consolidated*`` hold second copies of the weights in other layouts."""

HUB_TIMEOUT_S = 5.0


def resolve_model(name_or_path: str) -> Path:
    """Folder of a model; a hub id is downloaded, or found in the hub's cache.

    Raises:
        ModelNotFoundError: a path that is no folder, an id that the hub does not have, or a
            hub that cannot be reached while its cache lacks the model.
    """
    path = Path(name_or_path).expanduser()
    if name_or_path and path.is_dir():
        return path
    if path.exists() or name_or_path.startswith((os.sep, ".", "~")):
        raise ModelNotFoundError(f"there is no model folder {name_or_path!r}")
    try:
        # snapshot_download begins with the same question, but would wait for its answer for ever.
        HfApi().model_info(name_or_path, timeout=HUB_TIMEOUT_S)
        return _snapshot(name_or_path, cached=False)
    except Exception as error:  # the hub's own errors, httpx's, the disk's: their only common base
        return _cached_snapshot(name_or_path, error)


def _cached_snapshot(repo: str, why_not_hub: Exception) -> Path:
    try:
        return _snapshot(repo, cached=True)
    except Exception:
        reason = " ".join(str(why_not_hub).split()) or type(why_not_hub).__name__
        raise ModelNotFoundError(
            f"{repo!r} is neither a folder nor a model that the hub gives: {reason}"
        ) from why_not_hub


def _snapshot(repo: str, *, cached: bool) -> Path:
    folder: str = snapshot_download(
        repo,
        allow_patterns=list(ALLOWED),
        ignore_patterns=list(IGNORED),
        etag_timeout=HUB_TIMEOUT_S,
        local_files_only=cached,
    )
    return Path(folder)
