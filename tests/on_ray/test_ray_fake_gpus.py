"""Groups of several ranks on a Ray cluster of two nodes, one of which believes to have GPUs."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeAlias

import pytest
from instruments import light_hosts
from instruments.light_hosts import LightHost
from instruments.processes import runs, until

from outrider.actors.security import Security
from outrider.cluster import controller as controller_module
from outrider.cluster.cluster_config import ClusterConfig, parse_config
from outrider.cluster.controller import Controller
from outrider.cluster.placement import Need
from outrider.cluster.ray_runtime import attached_ray
from outrider.speculation.errors import ClusterError, WorkerError

pytestmark = pytest.mark.filterwarnings(
    # Ray leaves its processes and their logs to the garbage collector.
    "ignore:subprocess .* is still running:ResourceWarning",
    "ignore:unclosed file:ResourceWarning",
)
ROUNDS = 4
"""Starts and stops after which nothing may be left."""
PLACING_ROUNDS = 10
"""Stops in the midst of placing, each of which takes tens of milliseconds."""
READY_SECONDS = 60.0
OBJECT_STORE_BYTES = 80 << 20
NUM_GPUS = 4
BIG: dict[str, Any] = {"num_cpus": 0.5, "num_gpus": 1, "labels": {"tier": "big"}}


@pytest.fixture(scope="module")
def _two_nodes() -> Iterator[Any]:
    """Ray, of which this process is a driver."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # A node cannot offer GPUs, not even made-up ones, that are hidden from the process that starts it.
        patch.delenv("CUDA_VISIBLE_DEVICES")
        # Must stand before Ray is imported, and stay for as long as it is.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", "a-token-for-tests")
        from ray import cloudpickle
        from ray.cluster_utils import Cluster

        # Ray's processes cannot import what belongs to tests.
        cloudpickle.register_pickle_by_value(light_hosts)
        common: dict[str, Any] = {
            "num_cpus": 4,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
        cluster = Cluster(
            initialize_head=True, head_node_args={**common, "num_gpus": 0, "labels": {"tier": "small"}}
        )
        try:
            cluster.add_node(**common, num_gpus=NUM_GPUS, labels={"tier": "big"})
            with attached_ray(cluster.address, None):
                yield cluster
        finally:
            cluster.shutdown()
            cloudpickle.unregister_pickle_by_value(light_hosts)


@pytest.fixture
def ray(_two_nodes: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ray, whose targets are light."""
    import ray

    from outrider.cluster import ray_launcher

    monkeypatch.setattr(ray_launcher, "TargetHost", LightHost)
    monkeypatch.setattr(ray_launcher, "RankHost", LightHost)
    return ray


Scenario: TypeAlias = Callable[[Controller], Coroutine[Any, Any, None]]


def play(monkeypatch: pytest.MonkeyPatch, target: dict[str, Any], ranks: int, scenario: Scenario) -> None:
    """Runs a controller of one group, with the real launcher, while the scenario lasts."""
    from outrider.cluster.ray_launcher import RayLauncher

    config = parse_config({"target": target, "limits": {"start_seconds": READY_SECONDS}}, "x")

    def needs(_: ClusterConfig, *, at_most: bool = False) -> list[Need]:  # noqa: ARG001
        return [Need(name="target-0", ranks=ranks, each=config.target)]

    monkeypatch.setattr(controller_module, "needs_of", needs)

    async def act() -> None:
        launcher = RayLauncher(config, Security(), host=None)
        controller = Controller(config, launcher, time.monotonic)
        running = asyncio.ensure_future(controller.run())
        try:
            await scenario(controller)
        finally:
            controller.stop()
            await asyncio.wait_for(running, READY_SECONDS)

    asyncio.run(act())


def placement_groups() -> Counter[str]:
    """How many are in which state."""
    from ray.util import placement_group_table

    return Counter(group["state"] for group in placement_group_table().values())


def live_placement_groups() -> list[dict[str, Any]]:
    from ray.util import placement_group_table

    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def live_actors(ray: Any) -> list[str]:
    return [
        actor["ActorClassName"] for actor in ray._private.state.actors().values() if actor["State"] != "DEAD"
    ]


def nothing_is_left(ray: Any) -> bool:
    """Whether no actor and no placement group holds anything."""
    return (
        not live_actors(ray)
        and not live_placement_groups()
        and ray.available_resources().get("GPU") == NUM_GPUS
    )


def node_of_tier(ray: Any, tier: str) -> str:
    (node,) = [each for each in ray.nodes() if each["Alive"] and each["Labels"].get("tier") == tier]
    return str(node["NodeID"])


def pids_of(controller: Controller) -> list[int]:
    (row,) = controller.status()
    return [place["pid"] for place in row["places"]]


def test_a_group_is_placed_on_one_node_with_its_labels(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(controller: Controller) -> None:
        await controller.wait_ready(READY_SECONDS)
        (group,) = live_placement_groups()
        assert group["strategy"] == "STRICT_PACK"
        assert set(group["bundles_to_node_id"].values()) == {node_of_tier(ray, "big")}
        assert len(group["bundles"]) == len(set(pids_of(controller))) == 2
        assert ray.available_resources()["GPU"] == NUM_GPUS - 2
        assert live_actors(ray) == ["LightHost"] * 2

    play(monkeypatch, BIG, 2, scenario)
    assert until(lambda: nothing_is_left(ray))


def test_a_half_dead_group_is_rebuilt_whole(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(controller: Controller) -> None:
        await controller.wait_ready(READY_SECONDS)
        for lost in (1, 0):
            await lose(controller, lost)

    async def lose(controller: Controller, rank: int) -> None:
        before, (group,) = pids_of(controller), live_placement_groups()
        (old,) = controller.status()
        os.kill(before[rank], signal.SIGKILL)
        while controller.status()[0]["epoch"] == old["epoch"]:
            await asyncio.sleep(0.05)
        await controller.wait_ready(READY_SECONDS)
        (row,) = controller.status()
        assert (row["epoch"], row["starts"]) == (old["epoch"] + 1, old["starts"] + 1)
        assert not set(before) & set(pids_of(controller))
        assert until(lambda: not any(runs(pid) for pid in before))
        (rebuilt,) = live_placement_groups()
        assert rebuilt["placement_group_id"] != group["placement_group_id"]
        assert set(rebuilt["bundles_to_node_id"].values()) == {node_of_tier(ray, "big")}
        assert live_actors(ray) == ["LightHost"] * 2
        assert list(controller.targets()) == ["target-0"]

    play(monkeypatch, BIG, 2, scenario)
    assert until(lambda: nothing_is_left(ray))


@pytest.mark.parametrize(
    ("ranks", "change", "line"),
    [
        (5, {}, "waits for 2.5 CPU, 5 GPU, label tier=big on one node"),
        (2, {"labels": {"tier": "small"}}, "waits for 1 CPU, 2 GPU, label tier=small on one node"),
    ],
)
def test_a_group_without_room_says_what_it_waits_for(
    ranks: int, change: dict[str, Any], line: str, ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(controller: Controller) -> None:
        with pytest.raises(WorkerError) as caught:
            await controller.wait_ready(READY_SECONDS)
        assert str(caught.value) == f"target-0: {line}; free in the whole cluster: 8 CPU, {NUM_GPUS} GPU"

    assert until(lambda: nothing_is_left(ray))
    play(monkeypatch, {**BIG, **change}, ranks, scenario)
    assert until(lambda: nothing_is_left(ray))


@pytest.mark.parametrize(
    ("target", "pattern"),
    [
        (
            {"num_gpus": 64},
            r"^target-0 needs 1 CPU, 64 GPU on one node; left are: .* has 4 CPU, [04] GPU; .* GPU$",
        ),
        (
            {"labels": {"tier": "huge"}},
            r"^target-0 wants a node with tier=huge, and none of 2 has these labels$",
        ),
    ],
)
def test_what_can_never_fit_is_refused_before_anything_starts(
    target: dict[str, Any], pattern: str, ray: Any
) -> None:
    from outrider.cluster.ray_client import start_controller

    with pytest.raises(ClusterError, match=pattern):
        start_controller(parse_config({"target": target}, "x"), Security(), host=None, detached=False)
    assert live_actors(ray) == []


def test_a_process_that_cannot_be_made_says_why(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from outrider.cluster import ray_launcher

    async def scenario(controller: Controller) -> None:
        while not (row := controller.status()[0])["note"]:
            await asyncio.sleep(0.05)
        node = ray.util.get_node_ip_address()
        assert row["note"] == f"its process died: RuntimeError: a library is missing on {node}"
        assert row["phase"] in ("waiting", "placing")

    monkeypatch.setattr(ray_launcher, "TargetHost", light_hosts.BrokenHost)
    monkeypatch.setattr(ray_launcher, "RankHost", light_hosts.BrokenHost)
    play(monkeypatch, BIG, 2, scenario)
    assert until(lambda: nothing_is_left(ray))


def test_a_target_that_takes_nothing_is_placed(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(controller: Controller) -> None:
        await controller.wait_ready(READY_SECONDS)

    play(monkeypatch, {"num_cpus": 0}, 1, scenario)
    assert until(lambda: nothing_is_left(ray))


def test_stopping_while_everything_is_being_placed(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(controller: Controller) -> None:
        while controller.status()[0]["phase"] == "waiting":
            await asyncio.sleep(0)

    # Ray loses a group's GPUs once in some thirty times if it is removed in such a moment.
    for _ in range(PLACING_ROUNDS):
        play(monkeypatch, BIG, 2, scenario)
        assert until(lambda: nothing_is_left(ray))


def test_starting_and_stopping_again_and_again_leaves_nothing(
    ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(controller: Controller) -> None:
        await controller.wait_ready(READY_SECONDS)
        pids.extend(pids_of(controller))

    removed = placement_groups()["REMOVED"]
    pids: list[int] = []
    for _ in range(ROUNDS):
        play(monkeypatch, BIG, 2, scenario)
    assert until(lambda: nothing_is_left(ray))
    assert len(set(pids)) == 2 * ROUNDS
    assert until(lambda: not any(runs(pid) for pid in pids))
    assert placement_groups() == {"REMOVED": removed + ROUNDS}
