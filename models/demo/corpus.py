"""The text behind the embedded demo pair: the standard library's sources, split by top-level package.

Everything here depends only on the Python that runs it, so the held-out prompts
of tests and benchmarks exist on every machine without shipping any text.
"""

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"

HELD_OUT_PACKAGES = (
    "argparse", "calendar", "configparser", "dataclasses", "fractions", "gzip", "http", "json",
    "mailbox", "pathlib", "pprint", "queue", "sched", "shelve", "statistics", "string", "textwrap",
    "tomllib", "wave", "zipfile",
)  # fmt: skip
"""Top-level packages whose sources, and whose tests, the pair never sees in training."""

SKIPPED_PACKAGES = ("site-packages", "dist-packages", "__pycache__", "ensurepip", "lib-dynload")

MAX_FILE_BYTES = 400_000
"""Longer files are generated tables, which teach a small model nothing about code."""


def stdlib_root() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def top_level_package(path: Path) -> str:
    """Name of the top-level module or package that a path relative to the library belongs to."""
    return path.parts[0].removesuffix(".py")


def is_held_out(path: Path) -> bool:
    """True for a held-out package and for its tests (``test/test_json/…``, ``test/test_queue.py``)."""
    top = top_level_package(path)
    if top == "test" and len(path.parts) > 1:
        name = path.parts[1].removesuffix(".py").removeprefix("test_")
        return any(name == package or name.startswith(package) for package in HELD_OUT_PACKAGES)
    return top in HELD_OUT_PACKAGES


def source_files(*, held_out: bool) -> Iterator[Path]:
    """Paths relative to the library root, in a fixed order, of one side of the split."""
    root = stdlib_root()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if set(relative.parts) & set(SKIPPED_PACKAGES) or path.stat().st_size > MAX_FILE_BYTES:
            continue
        if is_held_out(relative) == held_out:
            yield relative


def read_source(relative: Path) -> str:
    """Text of one file; the few that are deliberately not UTF-8 lose their odd bytes."""
    return (stdlib_root() / relative).read_text(encoding="utf-8", errors="ignore")


def held_out_library_files() -> list[Path]:
    """Held-out modules themselves, without their tests."""
    return [path for path in source_files(held_out=True) if top_level_package(path) != "test"]


def held_out_prompts(count: int, *, lines: int = 12, seed: int = 0) -> list[str]:
    """``count`` different prompts of ``lines`` whole lines each, from the held-out modules.

    Raises:
        ValueError: ``count`` is not positive or more than the held-out text can give.
    """
    windows: list[tuple[Path, int]] = []
    texts: dict[Path, list[str]] = {}
    for path in held_out_library_files():
        texts[path] = read_source(path).splitlines(keepends=True)
        windows += [(path, start) for start in range(0, len(texts[path]) - lines, lines)]
    if not 0 < count <= len(windows):
        raise ValueError(f"count={count}: the held-out text gives 1 to {len(windows)} prompts")
    chosen = random.Random(seed).sample(windows, count)
    return ["".join(texts[path][start : start + lines]) for path, start in chosen]
