"""Tiny model and tokenizer folders, built once per session; tests must not write into them."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Triton reads it when it is first imported, by whatever does that; without it a GPU would be needed.
os.environ["TRITON_INTERPRET"] = "1"
# Threads that spin while they wait for each other take the cores from the tests beside them: minutes in all.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Where there is one, it is for ``make gpu-check``: all that is tested here runs on CPUs.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

MakeModelFolder = Callable[..., Path]

END_OF_TEXT = "<|endoftext|>"
TRAINING_TEXT = (
    "the quick brown fox jumps over the lazy dog",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "a naïve café, 東京, and a 😀 or two",
)
TOKENIZER_SIZE = 300

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
TINY = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session", autouse=True)
def _start_with_one_thread() -> None:
    """Products this small are fastest on one thread, above all on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _leave_one_thread() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.fixture
def outrider_(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process; exit code, standard output and standard error."""
    from outrider.cluster.cli.main import main

    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of ``TOKENIZER_SIZE`` tokens; id 0 is the special ``<|endoftext|>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT * 3, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_model_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path
) -> MakeModelFolder:
    """``make_model_folder(family, *, seed=0, dtype="float32", **config)``: a random model with the
    tiny tokenizer, as transformers saves it. The same arguments give the same folder.

    ``config`` overrides ``TINY``, in transformers' spelling, for example
    ``rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}``.
    """
    made: dict[str, Path] = {}

    def make(family: str, *, seed: int = 0, dtype: str = "float32", **config: Any) -> Path:
        key = json.dumps([family, seed, dtype, config], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            shutil.copytree(tiny_tokenizer_folder, folder, dirs_exist_ok=True)
            _save_random_model(folder, family, seed, dtype, config)
            made[key] = folder
        return made[key]

    return make


def _save_random_model(folder: Path, family: str, seed: int, dtype: str, config: dict[str, Any]) -> None:
    config_class, model_class = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**{**TINY, **config}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Norms of one and biases of zero, as transformers starts, would hide a decoder
                # that forgets them, and small weights one whose layers do nothing.
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
