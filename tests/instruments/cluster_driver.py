"""A program beside a cluster, run as a script where the cluster can be reached: prints JSON, a line
per event. ``at`` is the monotonic time, which all processes of a machine share.

    cluster_driver.py watch CLUSTER.YAML             the members, whenever something changes
    cluster_driver.py stream CLUSTER.YAML TEXT N     steps of one request, then its completion
    cluster_driver.py left CLUSTER.YAML              what Ray still has of any cluster
"""

import json
import sys
import time
from contextlib import suppress
from typing import Any

from outrider import SamplingParams
from outrider.cluster.cluster_config import ClusterConfig, load_config
from outrider.cluster.ray_cluster import Cluster
from outrider.cluster.standing import attached, standing_controller
from outrider.speculation.request import Completion

LOOK_SECONDS = 0.05
LEAVE_SECONDS = 10.0
FIGURES = ("drafters", "running")


def say(**event: Any) -> None:
    """One line."""
    print(json.dumps({"at": time.monotonic(), **event}), flush=True)


def params(max_tokens: int) -> SamplingParams:
    """Of ``stream``."""
    return SamplingParams(temperature=0.7, seed=5, max_tokens=max_tokens, ignore_eos=True)


def watch(config: ClusterConfig) -> None:
    """Until the cluster is gone. Figures are of a target that serves."""
    from ray.exceptions import RayActorError

    told: dict[str, Any] = {}
    with standing_controller(config) as controller, suppress(RayActorError):
        while True:
            event: dict[str, Any] = {"members": {row["name"]: row for row in controller.status()}}
            for target in controller.targets().values():
                with suppress(RayActorError):
                    figures = controller.target_status(target)
                    event |= {name: figures[name] for name in FIGURES}
            if event != told:
                say(**event)
                told = event
            time.sleep(LOOK_SECONDS)


def stream(config: ClusterConfig, prompt: str, max_tokens: int) -> None:
    """One request."""
    with Cluster(config) as cluster:
        (request,) = cluster.prepare(prompt, params(max_tokens))[1]
        for item in cluster.steps(request):
            if isinstance(item, Completion):
                say(token_ids=item.token_ids, stats=item.stats.as_dict())
            else:
                say(tokens=item.token_ids, accepted=item.num_accepted)


def left(config: ClusterConfig) -> None:
    """Named actors, placement groups and taken CPUs, once there are none or time is up."""
    with attached(config):
        import ray
        from ray.util import list_named_actors, placement_group_table

        deadline = time.monotonic() + LEAVE_SECONDS
        while True:
            groups = [each for each in placement_group_table().values() if each["state"] != "REMOVED"]
            actors = list_named_actors(all_namespaces=True)
            taken = ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0)
            if not (groups or actors or taken) or time.monotonic() > deadline:
                break
            time.sleep(LOOK_SECONDS)
    say(actors=actors, groups=groups, taken=taken)


def main() -> None:
    """See the module."""
    mode, path, *words = sys.argv[1:]
    config = load_config(path)
    if mode == "watch":
        watch(config)
    elif mode == "stream":
        stream(config, words[0], int(words[1]))
    else:
        left(config)


if __name__ == "__main__":
    main()
