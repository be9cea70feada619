"""``outrider check``: what would be placed where, and what stands in the way."""

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from outrider.cluster.cluster_config import ClusterConfig, Resources
from outrider.cluster.placement import Node, Plan, needs_of, plan
from outrider.cluster.probe import ModelReport, Probe
from outrider.cluster.standing import attached
from outrider.models.demo import pair


class NodeModels(Protocol):
    """Asks a node about models; see ``Probe.models``."""

    def __call__(self, names: Sequence[str]) -> list[ModelReport]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """nodes: by name. models: what each node that could take part sees, by node and model.

    problems: lines; none means that the cluster can be started.
    """

    nodes: list[Node]
    plan: Plan
    models: dict[str, list[ModelReport]]
    problems: list[str]


def check(config: ClusterConfig) -> CheckReport:
    """Looks at the nodes of the Ray cluster, or at this machine where it is to be local.

    Raises:
        ClusterError: there is no Ray cluster at the address.
    """
    with _nodes(config) as nodes:
        planned = plan(needs_of(config), [node for node, _ in nodes])
        models = {node.name: ask(sorted(_models_for(config, node))) for node, ask in nodes}
    problems = [*planned.problems, *_model_problems(config, models)]
    return CheckReport(nodes=[node for node, _ in nodes], plan=planned, models=models, problems=problems)


def model_of_pool(model: str | None) -> str:
    """A pool's draft model."""
    return model or str(pair.DRAFT)


@contextmanager
def _nodes(config: ClusterConfig) -> Iterator[list[tuple[Node, NodeModels]]]:
    if config.address == "local":
        yield [(this_machine(), Probe().models)]
        return
    with attached(config):
        from outrider.cluster.ray_client import nodes
        from outrider.cluster.ray_nodes import probes

        with probes(list(nodes().items()), config.network.interface, loopback=False) as found:
            yield [(probe.node, partial(probe.call, "models")) for probe in found]


def this_machine() -> Node:
    """As Ray would count it."""
    import torch

    amounts = {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}
    return Node(name=socket.gethostname(), resources={name: each for name, each in amounts.items() if each})


def _models_for(config: ClusterConfig, node: Node) -> set[str]:
    """The models of all processes that may run on a node."""
    users: list[tuple[Resources, str]] = [(config.target, config.target.model)]
    users += [(pool, model_of_pool(pool.model)) for pool in config.worker_pools]
    return {
        model
        for resources, model in users
        if all(node.labels.get(name) == value for name, value in resources.labels.items())
    }


def _model_problems(config: ClusterConfig, models: Mapping[str, Sequence[ModelReport]]) -> Iterator[str]:
    """Models that cannot be loaded where they would be, and drafts that do not fit the target."""
    for node, reports in models.items():
        for report in reports:
            if report.problem:
                yield f"on {node}: {report.problem}"
    seen = {report.model: report for reports in models.values() for report in reports if not report.problem}
    target = seen.get(config.target.model)
    for pool in config.worker_pools:
        draft = seen.get(model_of_pool(pool.model))
        if target and draft and target.vocab_hash != draft.vocab_hash:
            yield f"draft pool {pool.name!r}: {draft.model} has another vocabulary than {target.model}"
