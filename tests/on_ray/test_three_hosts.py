"""Head, target and draft worker on hosts of their own: placed by label, cut off, killed, and back.

The tests follow each other on one standing cluster, whose target is large enough to take its time.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from instruments import cluster_driver
from instruments.hosts import NotPermittedError, RayHosts, ray_hosts
from instruments.processes import until

from outrider import LLM
from outrider.cluster.bench.machine import measured_limits
from outrider.models.demo import pair
from outrider.models.inflate import inflate

Event = dict[str, Any]

PROMPT = "class Node:\n    def __init__(self"
LONG, SHORT = 400, 40
READY_SECONDS = 90.0
NOTICE_SECONDS = 1.5
"""Until a target finds out that a draft worker's host is out of reach."""
SLACK = 3
"""Others may use this machine."""
STEP_SECONDS = 0.01
"""For reading a target's weights, so that a text is under way until a host is back."""
LEAST, MOST = 60_000_000, 300_000_000
"""Parameters of a target."""
OUTRIDER = ("-m", "outrider.cluster.cli.main")
KINDS = ("ControllerHost", "DraftHost", "TargetHost")


class Driver:
    """A ``cluster_driver`` on the head, and what it has said."""

    def __init__(self, nodes: RayHosts, *words: str) -> None:
        self.events: list[Event] = []
        self.process = nodes.popen(cluster_driver.__file__, *words)
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.events.append(json.loads(line))
                self._changed.notify_all()

    def first(self, wanted: Callable[[Event], object], seconds: float, after: float = 0.0) -> Event:
        """The first event like that since ``after``, awaited."""

        def search() -> Event | None:
            return next((each for each in self.events if each["at"] >= after and wanted(each)), None)

        with self._changed:
            self._changed.wait_for(search, seconds)
            found = search()
        assert found is not None, f"nothing like that within {seconds:g} s; last: {self.events[-1:]}"
        return found

    def close(self) -> str:
        """Ends it; what it said on standard error."""
        self.process.kill()
        self._reader.join()
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        with self.process.stderr as stderr:
            error = stderr.read()
        self.process.wait()
        return error


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayHosts]:
    """Ray on three hosts, with room for one member each."""
    try:
        with ray_hosts(3) as made:
            for host, tier in zip(made.hosts, ("head", "target", "draft"), strict=True):
                made.start(host, {"tier": tier}, num_cpus=1)
            assert until(lambda: made.num_started == 3, READY_SECONDS), made.logs()
            yield made
    except NotPermittedError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def cluster(nodes: RayHosts, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The cluster.yaml of a cluster that is up."""
    folder = tmp_path_factory.mktemp("three")
    read_in_a_step = int(STEP_SECONDS * measured_limits().copy / 2)  # numbers of two bytes
    inflate(pair.TARGET, folder / "target", parameters=min(max(LEAST, read_in_a_step), MOST))
    path = folder / "cluster.yaml"
    path.write_text(
        "name: three\n"
        f"address: {nodes.address}\n"
        f"target: {{model: {folder / 'target'}, labels: {{tier: target}}}}\n"
        f"draft: {{model: {pair.DRAFT}, labels: {{tier: draft}}}}\n"
        "speculation: {tree: {adaptive: false}}\n"
    )
    up = nodes.run(*OUTRIDER, "up", str(path), seconds=READY_SECONDS)
    assert up.returncode == 0, f"{up.stderr}\n{nodes.logs()}"
    return str(path)


@pytest.fixture(scope="module")
def watch(nodes: RayHosts, cluster: str) -> Iterator[Driver]:
    driver = Driver(nodes, "watch", cluster)
    driver.first(serves, READY_SECONDS)
    yield driver
    driver.close()


@pytest.fixture
def stream(nodes: RayHosts, cluster: str) -> Iterator[Driver]:
    """A long request under way."""
    driver = Driver(nodes, "stream", cluster, PROMPT, str(LONG))
    yield driver
    driver.close()


@pytest.fixture(scope="module")
def truth() -> list[int]:
    """The tokens. Inflating a target changes no bit of its predictions."""
    with LLM() as llm:
        return llm.generate(PROMPT, cluster_driver.params(LONG))[0].outputs[0].token_ids


def serves(event: Event) -> bool:
    """All members are ready, and the target reaches the draft worker."""
    return event.get("drafters") == 1 and all(row["phase"] == "ready" for row in event["members"].values())


def is_completion(event: Event) -> bool:
    """The last event of a stream."""
    return "token_ids" in event


def not_ready(row: Event) -> bool:
    """A member that is to be started, as soon as there is room."""
    return row["phase"] in ("waiting", "placing")


def cut_off(nodes: RayHosts, watch: Driver) -> float:
    """Cuts the draft host's link; when it did, once the target has noticed."""
    began = time.monotonic()
    nodes.hosts[2].cut()
    noticed = watch.first(lambda event: event.get("drafters") == 0, NOTICE_SECONDS * SLACK, began)
    print(f"the target noticed the cut after {noticed['at'] - began:.2f} s")
    return began


def words(cluster: str, max_tokens: int) -> list[str]:
    """``outrider generate``, for the first tokens of ``truth``."""
    sampling = f"--temperature 0.7 --seed 5 --ignore-eos --max-tokens {max_tokens}".split()
    return [*OUTRIDER, "generate", cluster, "--json", "--prompt", PROMPT, *sampling]


def assert_generates(nodes: RayHosts, cluster: str, truth: list[int]) -> None:
    """The right tokens, some of which the draft worker guessed."""
    done = nodes.run(*words(cluster, SHORT))
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["token_ids"] == truth[:SHORT]
    stats = result["stats"]
    assert stats["growth_bytes"] > 0
    assert set(stats["accepted_by_drafter"]) == {"draft-0"}
    assert stats["accepted_by_drafter"]["draft-0"] == stats["num_accepted_draft_tokens"] > 0


def test_members_are_placed_by_label(nodes: RayHosts, cluster: str, watch: Driver, truth: list[int]) -> None:
    head, target, draft = nodes.hosts
    members = watch.events[0]["members"]
    places = {name: [place["node"] for place in row["places"]] for name, row in members.items()}
    assert places == {"target-0": [target.address], "draft-0": [draft.address]}
    assert members["draft-0"]["address"].partition(":")[0] == draft.address
    # The controller is where the loss of another host cannot end it.
    kinds = {host.address: [kind for kind in KINDS if host.processes(kind)] for host in nodes.hosts}
    assert kinds == {
        head.address: ["ControllerHost"],
        target.address: ["TargetHost"],
        draft.address: ["DraftHost"],
    }
    assert_generates(nodes, cluster, truth)


def test_the_draft_host_is_out_of_reach_for_a_moment(
    nodes: RayHosts, watch: Driver, stream: Driver, truth: list[int]
) -> None:
    stream.first(lambda event: event.get("accepted"), READY_SECONDS)
    cut_at = cut_off(nodes, watch)
    restored_at = time.monotonic()
    nodes.hosts[2].restore()
    back = watch.first(serves, READY_SECONDS, restored_at)
    print(f"the draft worker was back {back['at'] - restored_at:.2f} s after the link")
    completion = stream.first(is_completion, READY_SECONDS)
    assert completion["token_ids"] == truth
    assert completion["at"] > back["at"] > cut_at
    # The request was opened at it again, and what it guessed then was of use.
    assert completion["stats"]["generations"] > 1
    stream.first(lambda event: event.get("accepted"), 0, back["at"])
    pauses = [later["at"] - earlier["at"] for earlier, later in pairwise(stream.events)]
    print(f"the longest pause between two of {len(pauses)} steps was {max(pauses):.2f} s")
    assert max(pauses) < NOTICE_SECONDS


def test_the_draft_host_is_given_up_and_joins_anew(
    nodes: RayHosts, cluster: str, watch: Driver, stream: Driver, truth: list[int]
) -> None:
    draft = nodes.hosts[2]
    stream.first(lambda event: event.get("accepted"), READY_SECONDS)
    epoch = watch.events[-1]["members"]["draft-0"]["epoch"]
    cut_at = cut_off(nodes, watch)
    given_up = watch.first(lambda event: not_ready(event["members"]["draft-0"]), READY_SECONDS, cut_at)
    print(f"the draft worker was given up after {given_up['at'] - cut_at:.2f} s")
    assert stream.first(is_completion, READY_SECONDS)["token_ids"] == truth
    restored_at = time.monotonic()
    draft.restore()
    # Where Ray learns that it was given up it ends, and whatever looks after a host starts it again.
    assert until(lambda: not draft.processes("raylet"), READY_SECONDS)
    print(f"its Ray ended {time.monotonic() - restored_at:.2f} s after the link was back")
    joined_at = time.monotonic()
    nodes.start(draft, {"tier": "draft"}, num_cpus=1)
    resumed = watch.first(serves, READY_SECONDS, joined_at)
    print(f"the draft worker was rebuilt {resumed['at'] - joined_at:.2f} s after a host joined")
    assert resumed["members"]["draft-0"]["epoch"] > epoch
    assert resumed["members"]["target-0"]["starts"] == 1
    assert_generates(nodes, cluster, truth)


def test_the_target_host_dies_and_another_takes_its_place(
    nodes: RayHosts, cluster: str, watch: Driver, truth: list[int]
) -> None:
    target = nodes.hosts[1]
    started_at = time.monotonic()
    with nodes.popen(*words(cluster, 3 * LONG)) as generating:
        try:
            watch.first(lambda event: event.get("running"), READY_SECONDS, started_at)
            killed_at = time.monotonic()
            target.kill()
            out, error = generating.communicate(timeout=READY_SECONDS)
        finally:
            generating.kill()
    print(f"the command failed after {time.monotonic() - killed_at:.2f} s: {error}")
    assert (generating.returncode, out) == (1, "")
    assert re.fullmatch(r"outrider: error: target-0 died with 1 requests in flight .*\n", error)

    def waits(event: Event) -> bool:
        row = event["members"]["target-0"]
        return not_ready(row) and "tier=target" in row["note"]

    lost = watch.first(waits, READY_SECONDS, killed_at)
    print(f"after {lost['at'] - killed_at:.2f} s: {lost['members']['target-0']['note']}")
    joined_at = time.monotonic()
    nodes.start(target, {"tier": "target"}, num_cpus=1)
    rebuilt = watch.first(serves, READY_SECONDS, joined_at)
    print(f"the target was rebuilt {rebuilt['at'] - joined_at:.2f} s after a host joined")
    assert rebuilt["members"]["target-0"]["places"][0]["node"] == target.address
    assert_generates(nodes, cluster, truth)


def test_nothing_is_left_when_it_is_down(nodes: RayHosts, cluster: str) -> None:
    down = nodes.run(*OUTRIDER, "down", cluster)
    assert (down.returncode, down.stderr) == (0, "cluster 'three' is down\n")
    left = nodes.run(cluster_driver.__file__, "left", cluster)
    assert left.returncode == 0, left.stderr
    event = json.loads(left.stdout)
    assert (event["actors"], event["groups"], event["taken"]) == ([], [], 0)
    assert not any(host.processes(*KINDS) for host in nodes.hosts)
