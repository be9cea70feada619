"""One server with the demo pair for every client, in float32 so that scores can be compared."""

import json
from collections.abc import Iterator

import pytest
from instruments.client_environments import KEY
from instruments.serve_process import ServeProcess, serve_process

from outrider import LLM
from outrider.models.demo import pair

TREE = {"depth": 4, "adaptive": False}
"""Small as the pair is, drafting would hardly ever pay: this tree does not ask, as long as it is alone."""
DRAFTING = {"model": str(pair.DRAFT), "num_speculative_tokens": 4, "tree": TREE}


@pytest.fixture(scope="session")
def server() -> Iterator[ServeProcess]:
    """``outrider serve`` with a key, and with short answers: some clients ask for many."""
    words = ("--dtype", "float32", "--max-num-seqs", "4", "--max-model-len", "512", "--max-tokens", "64")
    with serve_process("--api-key", KEY, *words, "-sc", json.dumps(DRAFTING)) as process:
        yield process


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    """What the server's texts are compared with."""
    with LLM(str(pair.TARGET), dtype="float32") as model:
        yield model
