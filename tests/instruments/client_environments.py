"""Virtual environments for other projects' clients: what they need must not meet what Outrider needs."""

import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import distribution, distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PINNED = ROOT / "tests" / "clients" / "pinned"
ENVIRONMENTS = ROOT / ".venv-clients"
INSTALL_SECONDS = 900
MODEL = "outrider-demo"
"""That the servers of these tests serve."""
KEY = "sk-outrider"
"""That one of them asks for."""
CODE = [
    "def fibonacci(n):\n",
    "class Tree:\n    def __init__(self",
    "import numpy as np\n\n\ndef mean(values",
    "for index, value in enumerate(",
    "def test_addition():\n    assert",
    '    raise ValueError(f"',
    "from dataclasses import dataclass\n\n\n@dataclass\nclass",
    "while True:\n    line = ",
]
"""Beginnings of texts that the pair has learnt to write, so that some of what is drafted is accepted."""


@cache
def environment(name: str, *, torch: bool = False) -> Path:
    """Folder of the programs of an environment with what ``pinned/name.txt`` lists.

    Made once for as long as that file stays as it is. The test is skipped where it cannot be made.
    torch: Outrider's PyTorch is there, too. It outweighs all else, and is the build for this machine.
    """
    pinned = PINNED / f"{name}.txt"
    versions = sys.version + (version("torch") if torch else "")
    digest = hashlib.sha256(pinned.read_bytes() + versions.encode()).hexdigest()[:12]
    folder = ENVIRONMENTS / f"{name}-{digest}"
    complete = folder / "complete"
    if not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(folder)], name)
        words = ("install", "--quiet", "--disable-pip-version-check", "--no-deps", "--requirement")
        _run([str(folder / "bin" / "pip"), *words, str(pinned)], name)
        if torch:
            (site,) = folder.glob("lib/python*/site-packages")
            _link(Requirement("torch"), site)
        complete.touch()
    return folder / "bin"


def run_client(*words: str | Path, seconds: float = 300, **variables: str) -> str:
    """Standard output of a client's program, which has to succeed.

    variables: of its environment, which otherwise has nothing that this process's Python reads.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OPENAI_"))}
    done = subprocess.run(
        [str(word) for word in words],
        env={**kept, **variables},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def _link(needed: Requirement, site: Path) -> None:
    """Lets another environment use a distribution of this one, and what that needs, where it has none."""
    if any(distributions(name=needed.name, path=[str(site)])):
        return
    own = distribution(needed.name)
    for top in {file.parts[0] for file in own.files or ()} - {"..", "__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(str(own.locate_file(top)))
    for each in map(Requirement, own.requires or ()):
        extras = needed.extras or {""}
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras):
            _link(each, site)


def _run(words: list[str], name: str) -> None:
    try:
        subprocess.run(words, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{name} was not installed within {INSTALL_SECONDS} s")
    except subprocess.CalledProcessError as error:
        last = (error.stderr or error.stdout).strip().splitlines()[-1:]
        pytest.skip(f"{name} cannot be installed here: {' '.join(last)}")
