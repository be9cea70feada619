"""A run that is traced and recorded gives the same tokens, and the files account for all of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outrider.cluster.seeing.recording import read_recording
from outrider.speculation.replay import ReplayPolicy, replay

Run = Callable[..., tuple[int, str, str]]
PROMPTS = ("--prompt", "def fibonacci(n):", "--prompt", "import os\n")
WORDS = ("generate", *PROMPTS, "--max-tokens", "24", "--seed", "3", "--temperature", "0.7", "--json")
# Else a busy machine would find, rightly, that drafting does not pay.
ALWAYS = {"tree": {"adaptive": False}}
KINDS = {
    "plain": ("--no-speculation",),
    "in process": ("-sc", json.dumps(ALWAYS), "--draft", "DRAFT"),
    "workers, parallel": ("-sc", json.dumps(ALWAYS), "--draft", "DRAFT", "--workers", "local"),
    "workers, serial": (
        *("-sc", json.dumps({**ALWAYS, "pipeline": "serial"})),
        *("--draft", "DRAFT", "--workers", "local"),
    ),
}


@pytest.fixture(scope="module")
def models(make_model_folder: Any) -> tuple[str, str]:
    """Target and draft: the draft is the target's own first layer."""
    return (
        str(make_model_folder("llama", seed=1)),
        str(make_model_folder("llama", seed=1, num_hidden_layers=1)),
    )


def generated(run: Run, *words: str) -> list[list[int]]:
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    return [json.loads(line)["token_ids"] for line in out.splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_and_everything_is_told(
    kind: str, outrider_: Run, models: tuple[str, str], tmp_path: Path
) -> None:
    target, draft = models
    words = [*WORDS, "--target", target, *(draft if word == "DRAFT" else word for word in KINDS[kind])]
    plain = generated(outrider_, *WORDS, "--target", target)
    trace, record = tmp_path / "trace.json", tmp_path / "record.jsonl"
    code, out, err = outrider_(*words, "--trace", str(trace), "--record", str(record))
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["token_ids"] for row in rows] == plain
    told = accounted(json.loads(trace.read_bytes()))
    assert sorted(tokens for tokens, _ in told.values()) == sorted(plain)
    accepted = [row["stats"]["num_accepted_draft_tokens"] for row in rows]
    assert sorted(count for _, count in told.values()) == sorted(accepted)
    # A drafter that runs beside a target as quick as this one may be too late each time.
    assert kind == "workers, parallel" or (sum(accepted) > 0) == (kind != "plain")
    recording = read_recording(str(record))
    assert sorted(recording.requests) == sorted(told)
    for steps in recording.requests.values():
        require_reproduced(steps)


def accounted(trace: dict[str, Any]) -> dict[str, tuple[list[int], int]]:
    """Each request's committed tokens and how many of them were drafted; every one has its reason."""
    found: dict[str, tuple[list[int], int]] = {}
    for event in trace["traceEvents"]:
        args = event.get("args", {})
        if event.get("cat") != "request" or "tree" not in args:
            continue
        path = [args["tree"]["tokens"][node] for node in args["accepted"]]
        last = args["accepted"][-1] if path else -1
        own = args["chosen"][last + 1]
        assert args["committed"] == [*path, own][: len(args["committed"])]
        assert len(args["committed"]) == len(path) + 1 or "finish_reason" in args
        for node in args["accepted"]:
            assert args["tree"]["tokens"][node] == args["chosen"][args["tree"]["parents"][node] + 1]
        tokens, count = found.get(args["request"], ([], 0))
        found[args["request"]] = tokens + args["committed"], count + len(path)
    return found


def require_reproduced(steps: list[Any]) -> None:
    """Replaying what was recorded takes the recorded steps, one for one."""
    replayed = list(replay(steps, ReplayPolicy()))
    assert [each.num_committed for each in replayed] == [each.num_committed for each in steps]
    assert [each.num_nodes for each in replayed] == [len(each.tree) for each in steps]
