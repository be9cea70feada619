"""A cluster on a Ray of its own writes what one process alone writes, whoever dies meanwhile.

The first cluster brings Ray along; further ones of these tests live on it beside that one.
"""

import os
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
from instruments.processes import SECONDS, children, runs, until

from outrider import LLM, SamplingParams
from outrider.cluster import ray_cluster
from outrider.cluster.cluster_config import ClusterConfig, parse_config
from outrider.cluster.ray_cluster import Cluster
from outrider.cluster.standing import own_controller
from outrider.speculation.errors import ClusterError, ModelNotFoundError, TargetLostError, WorkerError
from outrider.speculation.request import Completion, Request, StepOutput

pytestmark = pytest.mark.filterwarnings(
    # Ray leaves its processes and their logs to the garbage collector.
    "ignore:subprocess .* is still running:ResourceWarning",
    "ignore:unclosed file:ResourceWarning",
)
LITTLE: dict[str, Any] = {"num_cpus": 0.25}
"""So that there is room for all of it on the smallest machine."""
# Drafts are always waited for, so that some are accepted however busy the machine is.
PATIENT = {"pipeline": "serial", "tree": {"adaptive": False}}
CONFIG: dict[str, Any] = {"target": LITTLE, "draft": LITTLE, "speculation": PATIENT}
PROMPTS = ("import os\n", "def fibonacci(n):\n", "class Tree:\n")
GREEDY = SamplingParams(temperature=0, max_tokens=32)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, seed=3, n=2, max_tokens=32)
LONG = SamplingParams(temperature=0.8, seed=5, max_tokens=192, ignore_eos=True)
BACK_SECONDS = 90.0
"""In which a dead member serves again; a tenth of it where nothing else runs."""


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    """An empty folder for temporary files, where no other cluster is remembered."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets need a short path
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    yield folder
    tempfile.tempdir = before
    rmtree(folder)


@pytest.fixture(scope="module")
def alone() -> Iterator[LLM]:
    """The same models in this process."""
    with LLM() as llm:
        yield llm


@pytest.fixture(scope="module")
def started(temporary: Path) -> Iterator[tuple[Cluster, list[int]]]:
    """A cluster, and the children that this process had before."""
    assert temporary.exists()
    before = children(os.getpid())
    with Cluster(parse_config(CONFIG, "x")) as cluster:
        yield cluster, before


@pytest.fixture
def cluster(started: tuple[Cluster, list[int]]) -> Cluster:
    """All of it serves."""
    cluster, _ = started
    assert until(lambda: not cluster.failures(), 2 * SECONDS), cluster.failures()
    return cluster


@pytest.fixture
def beside(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes further clusters, of other names, on the Ray of the first."""

    @contextmanager
    def connect(config: ClusterConfig, *, debug: bool) -> Iterator[Any]:  # noqa: ARG001
        with own_controller(config) as controller:
            yield controller

    assert cluster.status()
    monkeypatch.setattr(ray_cluster, "connect", connect)
    return lambda values: Cluster(parse_config(values, "x"))


def row_of(cluster: Cluster, name: str) -> dict[str, Any]:
    (row,) = [each for each in cluster.status() if each["name"] == name]
    return row


def kill(cluster: Cluster, name: str) -> dict[str, Any]:
    """Ends a member's process as a crash would; the status it had."""
    row = row_of(cluster, name)
    (place,) = row["places"]
    os.kill(place["pid"], signal.SIGKILL)
    return row


def back(cluster: Cluster, old: dict[str, Any]) -> bool:
    """Whether a killed member serves again in time, under a new epoch and in a new process."""

    def serves() -> bool:
        row = row_of(cluster, old["name"])
        anew = row["epoch"] > old["epoch"] and row["places"] != old["places"]
        return anew and bool(row["phase"] == "ready")

    return until(serves, BACK_SECONDS, pause=0.1)


def requests_of(llm: Any, prompts: Sequence[str], params: SamplingParams, **how: Any) -> list[Request]:
    return [each for prompt in prompts for each in llm.prepare(prompt, params, **how)[1]]


def answers(completions: Sequence[Completion]) -> list[tuple[Any, ...]]:
    """All that a user sees."""
    return [
        (each.index, each.text, each.token_ids, each.finish_reason, each.stop_reason) for each in completions
    ]


def written(llm: Any, params: SamplingParams, *, speculative: bool = False) -> list[tuple[Any, ...]]:
    """Answers to the prompts."""
    requests = requests_of(llm, PROMPTS, params, speculative=speculative)
    return answers(list(llm.complete_all(requests)))


@pytest.fixture(scope="module")
def long_answer(alone: LLM) -> tuple[list[int], str]:
    """Of the prompt that is served while something dies: its tokens and text."""
    (output,) = alone.generate(PROMPTS[1], LONG, speculative=False)
    (done,) = output.outputs
    assert len(done.token_ids) == LONG.max_tokens
    return done.token_ids, done.text


def streamed(steps: Sequence[StepOutput]) -> tuple[list[int], str]:
    """Tokens and text of a stream."""
    return [token for each in steps for token in each.token_ids], "".join(each.text for each in steps)


@pytest.mark.parametrize("speculative", [True, False])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_tokens_are_those_of_one_process(
    params: SamplingParams, speculative: bool, cluster: Cluster, alone: LLM
) -> None:
    assert written(cluster, params, speculative=speculative) == written(alone, params)


def test_accepted_tokens_are_attributed_to_the_draft_worker(cluster: Cluster) -> None:
    def drafted() -> bool:
        done = list(cluster.complete_all(requests_of(cluster, PROMPTS, GREEDY)))
        accepted = [each.stats.num_accepted_tokens for each in done]
        assert [each.stats.accepted_by_drafter.get("draft-0", 0) for each in done] == accepted
        return sum(accepted) > 0

    # A drafter that was late once may stay so for a text, if the machine is busy.
    assert until(drafted)
    assert {row["name"]: row["role"] for row in cluster.status()} == {
        "target-0": "target",
        "draft-0": "draft",
    }


def test_a_draft_worker_dies_mid_stream(
    cluster: Cluster, long_answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = []
    steps = cluster.stream(PROMPTS[1], LONG)
    begun.append(next(steps))
    old = kill(cluster, "draft-0")
    assert streamed([*begun, *steps]) == long_answer
    assert back(cluster, old)
    assert row_of(cluster, "target-0")["starts"] == 1

    def drafts() -> bool:
        (done,) = cluster.generate(PROMPTS[0], GREEDY)[0].outputs
        return done.stats.accepted_by_drafter.get("draft-0", 0) > 0

    assert until(drafts)
    # Ray would tell of it where texts are written.
    assert capsys.readouterr().out == ""


def test_the_only_target_dies_mid_stream(cluster: Cluster, alone: LLM) -> None:
    steps = cluster.stream(PROMPTS[1], LONG)
    next(steps)
    old = kill(cluster, "target-0")
    with pytest.raises(TargetLostError, match=r"^target-0 died with 1 requests? in flight"):
        list(steps)
    assert back(cluster, old)
    assert written(cluster, GREEDY, speculative=True) == written(alone, GREEDY)


def test_a_target_that_died_while_nobody_asked_is_not_asked_again(cluster: Cluster, alone: LLM) -> None:
    written(cluster, GREEDY)
    assert back(cluster, kill(cluster, "target-0"))
    assert written(cluster, GREEDY) == written(alone, GREEDY)


def test_another_target_goes_on_where_one_died(beside: Any, alone: LLM, long_answer: Any) -> None:
    from outrider.cluster.ray_client import find_controller

    with beside({"name": "two", "target": {**LITTLE, "replicas": 2, "max_num_seqs": 2}}) as cluster:
        controller = find_controller("two")
        assert controller is not None
        steps = cluster.stream(PROMPTS[1], LONG)
        begun = [next(steps)]
        targets = controller.targets()
        (serving,) = [name for name in targets if controller.target_status(targets[name])["running"]]
        old = kill(cluster, serving)
        assert streamed([*begun, *steps]) == long_answer
        assert back(cluster, old)

        # Again, with many requests on both.
        killed: list[dict[str, Any]] = []

        def interrupt(*_: object) -> None:
            if not killed:
                other = next(name for name in controller.targets() if name != serving)
                killed.append(kill(cluster, other))

        requests = requests_of(cluster, PROMPTS * 2, SAMPLED)
        done = list(cluster.complete_all(requests, interrupt))
        assert answers(done) == written(alone, SAMPLED) * 2


def test_a_target_of_two_ranks_is_rebuilt_when_one_dies(beside: Any) -> None:
    """What it writes is what two ranks write anywhere, before and after."""
    with LLM(tensor_parallel_size=2) as alone:
        (long_answer,) = alone.generate(PROMPTS[1], LONG)
        expected = written(alone, SAMPLED)
    target = {**LITTLE, "tensor_parallel_size": 2}
    with beside({"name": "ranks", "target": target, "draft": LITTLE, "speculation": PATIENT}) as cluster:
        assert written(cluster, SAMPLED, speculative=True) == expected
        steps = cluster.stream(PROMPTS[1], LONG)
        next(steps)
        old = row_of(cluster, "target-0")
        assert len(old["places"]) == 2
        os.kill(old["places"][1]["pid"], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(TargetLostError, match=r"^target-0 died with 1 requests? in flight"):
            list(steps)
        assert time.monotonic() - began < 2
        assert back(cluster, old)
        assert "".join(step.text for step in cluster.stream(PROMPTS[1], LONG)) == long_answer.outputs[0].text


def test_a_cluster_that_can_never_fit_is_refused_at_once(beside: Any) -> None:
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"^target-0 needs 1 CPU, 64 GPU on one node; left are: .* 0 GPU$"):
        beside({"name": "huge", "target": {"num_gpus": 64}})
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("section", ["target", "draft"])
def test_a_model_that_does_not_exist(section: str, beside: Any) -> None:
    values = {"target": LITTLE, "draft": LITTLE, section: {**LITTLE, "model": "/no/model"}}
    if section == "target":
        del values["draft"]
    with pytest.raises((ModelNotFoundError, WorkerError)) as caught:
        beside({"name": "nothing", **values})
    assert str(caught.value) == f"{section}-0: there is no model folder '/no/model'"


def test_a_second_cluster_of_the_same_name_is_refused(cluster: Cluster, beside: Any, alone: LLM) -> None:
    with pytest.raises(ClusterError, match="a cluster called 'outrider' is up already"):
        beside({"target": LITTLE})
    assert written(cluster, GREEDY) == written(alone, GREEDY)


def test_a_second_connection_of_one_process_is_refused(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match="connected to a Ray cluster already"):
        Cluster(parse_config({"name": "other"}, "x"))
    assert not cluster.failures()


def test_nothing_is_left_after_closing(started: tuple[Cluster, list[int]], temporary: Path) -> None:
    cluster, before = started
    family = descendants(os.getpid(), before)
    names = {Path(f"/proc/{pid}/comm").read_text().strip() for pid in family}
    assert {"gcs_server", "raylet"} <= names
    assert any(name.startswith("ray::") for name in names)
    assert [each for each in temporary.glob("outrider-*") if each.name != state_folder()]
    cluster.close()
    assert until(lambda: not any(runs(pid) for pid in family))
    assert children(os.getpid()) == before
    assert [each.name for each in temporary.iterdir() if each.name != state_folder()] == []
    cluster.close()


def descendants(pid: int, without: Sequence[int]) -> list[int]:
    """All that a process started, but for some children of it."""
    found = [each for each in children(pid) if each not in without]
    return found + [below for each in found for below in descendants(each, ())]


def state_folder() -> str:
    """Where standing clusters are remembered; it stays."""
    return f"outrider-{os.getuid()}"
