"""Reading safetensors folders: whole tensors, slices, and damage that must be noticed."""

import json
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider.models import resolve
from outrider.models.resolve import resolve_model
from outrider.models.weights import Checkpoint
from outrider.speculation.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError

MATRIX = torch.arange(48, dtype=torch.float32).reshape(6, 8)
VECTOR = torch.arange(6, dtype=torch.bfloat16)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file({"matrix": MATRIX, "vector": VECTOR}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"matrix": MATRIX}, tmp_path / "model-1.safetensors")
    save_file({"vector": VECTOR}, tmp_path / "model-2.safetensors")
    shards = {"matrix": "model-1.safetensors", "vector": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return tmp_path


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_tensors_keep_values_and_dtype(layout: str, request: pytest.FixtureRequest) -> None:
    checkpoint = Checkpoint(request.getfixturevalue(layout))
    matrix, vector = checkpoint.tensor("matrix", (6, 8)), checkpoint.tensor("vector", (6,))
    assert torch.equal(matrix, MATRIX)
    assert torch.equal(vector, VECTOR)
    assert (matrix.dtype, vector.dtype) == (torch.float32, torch.bfloat16)
    assert checkpoint.names() == ["matrix", "vector"]
    assert checkpoint.shape("matrix") == (6, 8)


def test_slices(single: Path) -> None:
    checkpoint = Checkpoint(single)
    assert torch.equal(checkpoint.tensor("matrix", (6, 8), rows=slice(2, 4)), MATRIX[2:4])
    assert torch.equal(checkpoint.tensor("matrix", (6, 8), columns=slice(4, 8)), MATRIX[:, 4:8])
    both = checkpoint.tensor("matrix", (6, 8), rows=slice(0, 3), columns=slice(1, 2))
    assert torch.equal(both, MATRIX[0:3, 1:2])
    assert torch.equal(checkpoint.tensor("vector", (6,), rows=slice(3, 6)), VECTOR[3:6])


def test_reads_what_transformers_saves(make_model_folder) -> None:
    folder = make_model_folder("qwen3")
    checkpoint = Checkpoint(folder)
    expected = load_file(folder / "model.safetensors")
    assert checkpoint.names() == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.tensor(name, tuple(tensor.shape)), tensor)


def test_missing_tensor_and_wrong_shape_are_named(single: Path) -> None:
    checkpoint = Checkpoint(single)
    assert checkpoint.has("matrix")
    assert not checkpoint.has("lm_head.weight")
    with pytest.raises(CheckpointError, match=r"has no tensor lm_head\.weight"):
        checkpoint.tensor("lm_head.weight", (6, 8))
    with pytest.raises(CheckpointError, match=r"tensor matrix has shape \(6, 8\), its model needs \(8, 6\)"):
        checkpoint.tensor("matrix", (8, 6))
    with pytest.raises(CheckpointError, match=r"needs \(12, 8\)"):
        checkpoint.tensor("matrix", (12, 8), rows=slice(0, 6))


@pytest.mark.parametrize("kept_bytes", [0, 5, 60, -1])
@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_truncated_file_is_named(layout: str, kept_bytes: int, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(layout)
    damaged = max(folder.glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:kept_bytes])
    with pytest.raises(CheckpointError, match=f"{damaged.name} is truncated"):
        Checkpoint(folder)


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the shard model-2\.safetensors"):
        Checkpoint(sharded)


@pytest.mark.parametrize("content", ['{"weight_map": {', "{}", "[]", '{"weight_map": [1]}'])
def test_damaged_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json is no index of shards"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "a.pt", "b.pth"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80")
    with pytest.raises(UnsupportedModelError, match=rf"{name}.*refused: safetensors only"):
        Checkpoint(tmp_path)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="has no weights"):
        Checkpoint(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"no model folder .*absent"):
        Checkpoint(tmp_path / "absent")


def test_existing_folder_resolves_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/org") == tmp_path / "org"


@pytest.mark.parametrize("name", ["/absent/model", "./model", "../model", "~/model", ""])
def test_paths_never_reach_the_hub(name: str, hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/absent")
    with pytest.raises(ModelNotFoundError, match=f"no model folder '{name}'"):
        resolve_model(name)
    assert hub == []


def test_a_file_is_no_model(tmp_path: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("weights").touch()
    with pytest.raises(ModelNotFoundError, match="no model folder 'weights'"):
        resolve_model("weights")
    assert hub == []


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that knows only ``org/name``; the list records what was asked of it."""
    asked: list[str] = []

    def model_info(_self: object, repo: str, *, timeout: float) -> None:
        assert timeout <= resolve.HUB_TIMEOUT_S
        asked.append(repo)
        if repo != "org/name":
            raise OSError("404 Client Error.\n\nRepository Not Found")

    def snapshot_download(repo: str, *, local_files_only: bool, **options: list[str]) -> str:
        assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in options["allow_patterns"])
        if local_files_only and repo != "org/cached":
            raise OSError("not in the cache")
        return str(tmp_path / repo)

    monkeypatch.setattr(resolve.HfApi, "model_info", model_info)
    monkeypatch.setattr(resolve, "snapshot_download", snapshot_download)
    return asked


def test_hub_ids(tmp_path: Path, hub: list[str]) -> None:
    assert resolve_model("org/name") == tmp_path / "org/name"
    assert resolve_model("org/cached") == tmp_path / "org/cached"
    with pytest.raises(
        ModelNotFoundError, match=r"^'org/nothing' .*404 Client Error\. Repository Not Found$"
    ):
        resolve_model("org/nothing")
    assert hub == ["org/name", "org/cached", "org/nothing"]


def test_silent_hub_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub 2.4 alone waits for ever for a hub that accepts connections and says nothing."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(resolve, "HUB_TIMEOUT_S", 0.2)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with pytest.raises(ModelNotFoundError, match=r"'org/name' .*timed out"):
            resolve_model("org/name")
