"""Native code in a program of its own, under the compiler's sanitizers."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def run_sanitized(source: str, folder: Path) -> str:
    """Compiles a file of ``tests/instruments`` in ``folder`` and runs it; what it printed."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    empty = folder / "empty.cpp"
    empty.write_text("int main() {}\n")
    if subprocess.run([compiler, *SANITIZERS, empty, "-o", folder / "empty"], capture_output=True).returncode:
        pytest.skip(f"{compiler} has no sanitizers")
    program = folder / "sanitized"
    flags = ("-std=c++17", "-O1", "-ffp-contract=off", "-w", f"-I{ROOT / 'kernels' / 'native'}", "-ldl")
    given = ROOT / "tests" / "instruments" / source
    subprocess.run([compiler, given, "-o", program, *SANITIZERS, *flags], check=True, timeout=120)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
