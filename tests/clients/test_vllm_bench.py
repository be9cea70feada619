"""``vllm bench serve``: what it prints of speculation is what the server counted meanwhile."""

import json
import re
from pathlib import Path

import pytest
from instruments.client_environments import CODE, KEY, MODEL, environment, run_client
from instruments.scraped import between, counts
from instruments.serve_process import ServeProcess

from outrider import LLM, SamplingParams
from outrider.models.demo import pair

TOKENS = 24
SPECULATION = "vllm:spec_decode_num"


def printed_figures(printed: str) -> dict[str, str]:
    """The lines ``name: figure`` of the table that it ends with."""
    table = printed.partition("Serving Benchmark Result")[2]
    return dict(re.findall(r"^ *(\S.*?): +([\d.]+) *$", table, re.MULTILINE))


@pytest.mark.parametrize(
    ("backend", "endpoint"), [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")]
)
def test_vllm_bench_serve_prints_what_was_drafted(
    backend: str, endpoint: str, server: ServeProcess, llm: LLM, tmp_path: Path
) -> None:
    dataset, netrc = tmp_path / "prompts.jsonl", tmp_path / "netrc"
    dataset.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in CODE))
    # It asks for /metrics without the key of OPENAI_API_KEY, but all its requests take one from here.
    netrc.write_text(f"machine 127.0.0.1 login anybody password {KEY}\n")
    netrc.chmod(0o600)
    before = counts(server.url, KEY)
    printed = run_client(
        environment("vllm", torch=True) / "vllm",
        *("bench", "serve", "--backend", backend, "--base-url", server.url, "--endpoint", endpoint),
        *("--model", MODEL, "--tokenizer", pair.TARGET, "--dataset-name", "custom"),
        *("--dataset-path", dataset, "--skip-chat-template", "--disable-shuffle"),
        *("--num-prompts", str(len(CODE)), "--custom-output-len", str(TOKENS), "--ignore-eos"),
        *("--temperature", "0", "--max-concurrency", "1", "--disable-tqdm"),
        *("--save-result", "--save-detailed", "--result-dir", tmp_path, "--result-filename", "result.json"),
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "hub"),
        NETRC=str(netrc),
        VLLM_NO_USAGE_STATS="1",
    )
    counted = between(before, counts(server.url, KEY))
    result = json.loads((tmp_path / "result.json").read_text())

    assert (result["completed"], result["failed"]) == (len(CODE), 0)
    assert result["total_input_tokens"] == counted["vllm:prompt_tokens_total"]
    assert result["total_output_tokens"] == counted["vllm:generation_tokens_total"] == len(CODE) * TOKENS
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    prompts = [
        llm.model.tokenizer.encode_chat([{"role": "user", "content": each}]) if "chat" in endpoint else each
        for each in CODE
    ]
    assert result["generated_texts"] == [each.outputs[0].text for each in llm.generate(prompts, params)]

    drafts, drafted, accepted = (
        counted[f"{SPECULATION}_{name}_total"] for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    assert drafted >= drafts > 0
    assert accepted > 0
    figures = printed_figures(printed)
    assert (figures["Drafts"], figures["Draft tokens"]) == (f"{drafts:.0f}", f"{drafted:.0f}")
    assert figures["Accepted tokens"] == f"{accepted:.0f}"
    assert figures["Acceptance rate (%)"] == f"{accepted / drafted * 100:.2f}"
    assert figures["Acceptance length"] == f"{1 + accepted / drafts:.2f}"
    by_position = {
        f"Position {found[1]}": f"{count / drafts * 100:.2f}"
        for name, count in counted.items()
        if (found := re.fullmatch(rf"{SPECULATION}_accepted_tokens_per_pos_total\[(\d+)\]", name))
    }
    assert by_position
    assert {name: figure for name, figure in figures.items() if name.startswith("Position")} == by_position
