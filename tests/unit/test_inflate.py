"""An inflated model predicts exactly what its source does, and executes every block."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from outrider.models.config import load_config
from outrider.models.inflate import count_parameters, inflate, main, parse_count
from outrider.models.weights import Checkpoint
from outrider.speculation.errors import InvalidConfigError

IDS = torch.tensor([[3, 17, 250, 4, 99, 31, 7, 0, 12]])


def load_fp32(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_logits_through_more_blocks(
    make_model_folder: Any, tmp_path: Path, family: str, dtype: str
) -> None:
    source = make_model_folder(family, dtype=dtype, tie_word_embeddings=family == "llama")
    config = inflate(source, tmp_path / "deep", layers=5)
    deep = load_fp32(tmp_path / "deep")
    executed: list[torch.Tensor] = []
    for layer in deep.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda _m, _i, output: executed.append(output))
        layer.mlp.up_proj.register_forward_hook(lambda _m, _i, output: executed.append(output))

    assert torch.equal(logits(deep), logits(load_fp32(source)))
    assert len(executed) == 2 * 5
    assert all(output.count_nonzero() > 0.9 * output.numel() for output in executed)
    assert (config.num_layers, config.dtype) == (5, dtype)
    saved = load_file(tmp_path / "deep" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {getattr(torch, dtype)}


def test_appended_blocks_are_random_inside_and_write_nothing(make_model_folder: Any, tmp_path: Path) -> None:
    biases = {"attention_bias": True, "mlp_bias": True}
    inflate(make_model_folder("llama", **biases), tmp_path / "deep", layers=4)
    checkpoint = Checkpoint(tmp_path / "deep")
    seen: set[bytes] = set()
    for index in (2, 3):
        block = f"model.layers.{index}."
        for name in (name for name in checkpoint.names() if name.startswith(block)):
            tensor = checkpoint.tensor(name, checkpoint.shape(name))
            if "norm" in name:
                assert torch.equal(tensor, torch.ones_like(tensor))
            elif "o_proj" in name or "down_proj" in name:
                assert not tensor.any()
            else:
                assert 0.01 < tensor.std() < 0.03
                seen.add(tensor.numpy().tobytes())
    assert len(seen) == 2 * 5 * 2


def test_parameters_give_the_smallest_sufficient_depth(make_model_folder: Any, tmp_path: Path) -> None:
    for tied in (True, False):
        source = make_model_folder("qwen2", tie_word_embeddings=tied)
        present = sum(tensor.numel() for tensor in load_fp32(source).parameters())
        block = sum(tensor.numel() for tensor in load_fp32(source).model.layers[0].parameters())
        assert count_parameters(load_config(source), Checkpoint(source)) == present
        for wanted, layers in (
            (present, 2),
            (present + 1, 3),
            (present + 2 * block, 4),
            (present + 2 * block + 1, 5),
        ):
            out = tmp_path / f"{tied}-{wanted}"
            assert inflate(source, out, parameters=wanted).num_layers == layers
            assert sum(tensor.numel() for tensor in load_fp32(out).parameters()) >= wanted


def test_seed_decides_the_appended_weights(make_model_folder: Any, tmp_path: Path) -> None:
    source = make_model_folder("llama")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        inflate(source, tmp_path / name, layers=3, seed=seed)
    contents = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert contents[0] == contents[1] != contents[2]


def test_tokenizer_and_layer_types_come_along(make_model_folder: Any, tmp_path: Path) -> None:
    source = make_model_folder("qwen3")
    inflate(source, tmp_path, layers=6)
    text = "the quick brown 😀"
    ids = AutoTokenizer.from_pretrained(source).encode(text)
    assert AutoTokenizer.from_pretrained(tmp_path).encode(text) == ids
    assert (tmp_path / "generation_config.json").exists()
    assert json.loads((tmp_path / "config.json").read_text())["layer_types"] == ["full_attention"] * 6


def test_old_checkpoints_frequencies_and_tied_head_are_left_out(
    make_model_folder: Any, tmp_path: Path
) -> None:
    folder = make_model_folder("llama", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, old / "model.safetensors")

    inflate(old, tmp_path / "deep", layers=3)
    inflate(folder, tmp_path / "expected", layers=3)

    assert Checkpoint(tmp_path / "deep").names() == Checkpoint(tmp_path / "expected").names()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({}, r"exactly one of parameters \(None\) and layers \(None\)"),
        ({"layers": 3, "parameters": 10**6}, r"exactly one of parameters \(1000000\) and layers \(3\)"),
        ({"layers": 1}, "layers=1 is below the source's 2"),
        ({"parameters": 1000}, "parameters=1000 is below the source's"),
    ],
)
def test_bad_sizes_are_refused(
    make_model_folder: Any, tmp_path: Path, size: dict[str, int], message: str
) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        inflate(make_model_folder("llama"), tmp_path / "out", **size)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(make_model_folder: Any, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    for out in (tmp_path, tmp_path / "precious"):
        with pytest.raises(InvalidConfigError, match=f"{out} is not an empty folder"):
            inflate(make_model_folder("llama"), out, layers=3)
    assert (tmp_path / "precious").read_text() == "data"
    assert len(list(tmp_path.iterdir())) == 1


def test_counts() -> None:
    assert parse_count("120M") == 120_000_000
    assert parse_count("1.5b") == 1_500_000_000
    assert parse_count("4096") == 4096
    for text in ("", "12X", "-3M", "1e6", "M"):
        with pytest.raises(InvalidConfigError, match=f"'{text}' is no number of parameters"):
            parse_count(text)


def test_command_line(make_model_folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(make_model_folder("llama")), str(tmp_path / "deep")
    assert main([source, out, "--parameters", "0.05M"]) == 0
    assert load_config(Path(out)).num_layers == 4
    capsys.readouterr()

    for arguments, message in (
        ([source, out, "--layers", "3"], "not an empty folder"),
        ([source, out + "2", "--parameters", "lots"], "'lots' is no number"),
        ([str(tmp_path / "absent"), out + "2", "--layers", "3"], "no model folder"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        main([source, out + "2"])
