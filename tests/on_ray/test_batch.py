"""Batches on a real Ray: a stage of a Ray Data pipeline, and run-batch on a cluster."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
from instruments.batches import row, run_job, tokens, write_lines

from outrider import LLM, SamplingParams
from outrider.cluster.cluster_config import parse_config
from outrider.cluster.ray_cluster import Cluster
from outrider.models.demo import pair

pytestmark = [
    # Ray leaves its processes and their logs to the garbage collector, and warns of its own future.
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]
LITTLE: dict[str, Any] = {"num_cpus": 0.25, "max_model_len": 256}
TARGET = {**LITTLE, "model": str(pair.DRAFT), "replicas": 2, "max_num_seqs": 2}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two small targets that draft for themselves, on a Ray that Ray Data uses, too."""
    tmp_path_factory.getbasetemp()  # or it would be made in the folder below, which goes
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets need a short path
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    config = parse_config({"target": TARGET, "draft": {"method": "ngram"}}, "x")
    with Cluster(config) as started:
        yield started
    tempfile.tempdir = before
    rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def alone() -> Iterator[LLM]:
    """The same target in this process."""
    with LLM(str(pair.DRAFT), max_model_len=256) as llm:
        yield llm


def test_a_cluster_answers_as_one_process_does(cluster: Cluster, alone: LLM, tmp_path: Path) -> None:
    lines = [row(f"row-{number}", n=1 + number % 2, max_tokens=8 + 5 * number) for number in range(12)]
    source = write_lines(tmp_path / "in", [*lines, row("bad", top_p=2)])
    there = run_job(cluster, source, tmp_path / "out")
    here = run_job(alone, source, tmp_path / "alone")
    assert (there.rows, there.failed) == (here.rows, here.failed) == (13, 1)
    assert tokens(tmp_path / "out") == tokens(tmp_path / "alone")
    # One was started by a cluster, the other alone: the job is the same.
    assert run_job(alone, source, tmp_path / "out").earlier == 13


def test_rows_of_a_dataset(cluster: Cluster, alone: LLM) -> None:
    import ray.data

    from outrider.cluster.batch import ProcessorConfig, build_processor

    assert cluster.status()
    ray.data.DataContext.get_current().enable_progress_bars = False
    questions = [{"item": number, "text": f"def f{number}("} for number in range(6)]
    config = ProcessorConfig(
        model_source=str(pair.DRAFT),
        engine_kwargs={"max_model_len": 256, "speculative_config": {"method": "ngram"}},
        batch_size=2,
        actor_options={"num_cpus": 0.25},
    )

    def asked(each: dict[str, Any]) -> dict[str, Any]:
        params = {"max_tokens": 12, "temperature": 0.5, "seed": each["item"]}
        # One row is refused, and it is alone in that.
        return {
            "prompt": each["text"],
            "sampling_params": {**params, "top_p": 2.0 if each["item"] == 3 else 1.0},
        }

    processor = build_processor(config, asked)
    rows = sorted(processor(ray.data.from_items(questions)).take_all(), key=lambda each: each["item"])
    assert [each["item"] for each in rows] == list(range(6))
    for each in rows:
        if each["item"] == 3:
            assert each["error"] == "top_p must be within (0, 1], not 2.0"
            assert each["generated_text"] is None
            continue
        params = SamplingParams(max_tokens=12, temperature=0.5, seed=each["item"])
        (expected,) = alone.generate(each["text"], params)
        assert each["error"] is None
        assert each["generated_text"] == expected.outputs[0].text
        assert list(each["generated_tokens"]) == expected.outputs[0].token_ids
        assert each["num_generated_tokens"] == len(expected.outputs[0].token_ids)
        assert each["mean_acceptance_length"] >= 1
