"""The generated code is what the compiler makes of the committed protocol."""

from pathlib import Path

import grpc_tools
import pytest
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ("speculation_pb2.py", "speculation_pb2.pyi")


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("protos")
    arguments = [f"-Ioutrider/protos={ROOT / 'protos'}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
    arguments += [f"--{kind}_out={out}" for kind in ("python", "pyi")]
    assert protoc.main(["protoc", *arguments, str(ROOT / "protos" / "speculation.proto")]) == 0
    return out / "outrider" / "protos"


@pytest.mark.parametrize("name", GENERATED)
def test_generated_code_has_not_drifted(regenerated: Path, name: str) -> None:
    committed = (ROOT / "protos" / name).read_text(encoding="utf-8")
    assert committed == (regenerated / name).read_text(encoding="utf-8"), "run `make protos`"


def test_nothing_else_is_generated(regenerated: Path) -> None:
    assert {path.name for path in regenerated.iterdir()} == set(GENERATED)
    assert {path.name for path in (ROOT / "protos").glob("*_pb2*")} == set(GENERATED)
