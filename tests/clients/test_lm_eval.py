"""lm-eval scores texts over HTTP as transformers does in this process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from instruments.client_environments import KEY, MODEL, ROOT, environment, run_client
from instruments.serve_process import ServeProcess
from transformers import AutoModelForCausalLM

from outrider import LLM
from outrider.models.demo import pair

TASKS = Path("tests/clients/tasks")
CLOSE = 2e-3
"""Nats over a whole line, in float32: two forwards sum in different orders."""


def score(model: Any, context: list[int], line: list[int]) -> tuple[float, bool]:
    """Log-probability of a line after its context, and whether it is what the model would write."""
    ids = torch.tensor([context + line])
    with torch.no_grad():
        logits = model(ids).logits[0, len(context) - 1 : -1].float()
    logprobs = logits.log_softmax(-1)[torch.arange(len(line)), torch.tensor(line)]
    return float(logprobs.sum()), bool((logits.argmax(-1) == torch.tensor(line)).all())


def test_lm_eval_scores_as_transformers_does(server: ServeProcess, llm: LLM, tmp_path: Path) -> None:
    where = f"base_url={server.url}/v1/completions,model={MODEL},tokenizer={pair.TARGET}"
    run_client(
        environment("lmeval") / "lm_eval",
        *("--model", "local-completions", "--model_args", f"{where},num_concurrent=2,max_retries=1"),
        *("--tasks", "next_lines", "--include_path", str(ROOT / TASKS)),
        *("--output_path", tmp_path, "--log_samples"),
        seconds=600,
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        HF_HOME=str(tmp_path / "hub"),
        OPENAI_API_KEY=KEY,
    )
    (samples,) = tmp_path.rglob("samples_next_lines_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == len((ROOT / TASKS / "next_lines.jsonl").read_text().splitlines())
    model = AutoModelForCausalLM.from_pretrained(pair.TARGET, dtype=torch.float32)
    for row in rows:
        document = row["doc"]
        # To lm-eval, spaces between the two belong to the line.
        context = llm.model.tokenizer.encode(document["context"].rstrip())
        scores = []
        for choice, response in zip(document["choices"], row["resps"], strict=True):
            whole = llm.model.tokenizer.encode(document["context"] + choice)
            line = whole[len(context) :]
            ((told, greedy),) = response
            expected, is_greedy = score(model, whole[: len(context)], line)
            assert float(told) == pytest.approx(expected, abs=CLOSE)
            assert str(greedy) == str(is_greedy)
            scores.append(expected)
        assert row["acc"] == float(max(range(len(scores)), key=scores.__getitem__) == document["answer"])
