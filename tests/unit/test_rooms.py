"""The rooms and who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "kernels": set(),
    "protos": set(),
    "speculation": {"kernels"},
    "models": {"kernels", "speculation"},
    "actors": {"kernels", "models", "protos", "speculation"},
    "cluster": {"actors", "kernels", "models", "speculation"},
}
ONLY_IN = {
    "ray": ("cluster/",),
    "grpc": (
        "actors/grpc_client.py",
        "actors/grpc_probe.py",
        "actors/grpc_server.py",
        "actors/security.py",
    ),
    "grpc_health": ("actors/grpc_probe.py", "actors/grpc_server.py"),
    "google.protobuf": ("actors/wire.py", "protos/speculation_pb2.py"),
    "outrider.protos": ("actors/wire.py",),
    "triton": ("kernels/gpu/",),
}
"""Libraries that stay behind thin wrappers, and the files or rooms that hold them."""


def modules() -> list[Path]:
    return [path for room in MAY_IMPORT for path in sorted((ROOT / room).rglob("*.py"))]


def imported_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_order_of_the_rooms(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for name in imported_names(path):
        top, *rest = name.split(".")
        assert top not in MAY_IMPORT, f"{path} imports {name}: write outrider.{name}"
        if top == "outrider":
            assert rest, f"{path} imports the package itself"
            assert rest[0] in MAY_IMPORT[room] | {room}, f"{path} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_libraries_stay_behind_their_wrappers(path: Path) -> None:
    where = str(path.relative_to(ROOT))
    for name in imported_names(path):
        for library, holders in ONLY_IN.items():
            if f"{name}.".startswith(f"{library}."):
                assert where.startswith(holders), f"{path} imports {name}"


def test_the_wrappers_exist() -> None:
    assert all((ROOT / path).exists() for library in ("grpc", "google.protobuf") for path in ONLY_IN[library])


def test_there_is_something_to_check() -> None:
    rooms = {path.relative_to(ROOT).parts[0] for path in modules()}
    assert {"kernels", "protos", "speculation", "models", "actors", "cluster"} <= rooms


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_is_linked_and_is_no_package_of_its_own(room: str) -> None:
    # With an __init__.py, `import kernels` from the repository root would shadow other packages.
    assert not (ROOT / room / "__init__.py").exists()
    if (ROOT / room).exists():
        link = ROOT / "src" / "outrider" / room
        assert link.is_symlink()
        assert link.resolve() == ROOT / room
