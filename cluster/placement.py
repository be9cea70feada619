"""What of a cluster would run where: plain arithmetic over nodes and what they offer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from outrider.cluster.cluster_config import ClusterConfig, Resources


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """name: for people. resources: in all, in Ray's terms. labels: as Ray knows them."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Processes that belong together on one node: a target group, or one draft worker."""

    name: str
    ranks: int
    each: Resources


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """places: the node of each need that fits. problems: a line on each that does not."""

    places: dict[str, str]
    problems: list[str]


def needs_of(config: ClusterConfig, *, at_most: bool = False) -> list[Need]:
    """Target groups first: without them nothing works, and they are the largest.

    at_most: with the draft workers that come only when they are wanted.
    """
    target = config.target
    groups = [
        Need(name=f"target-{index}", ranks=target.tensor_parallel_size, each=target)
        for index in range(target.replicas)
    ]
    workers = [
        Need(name=f"{pool.name}-{index}", ranks=1, each=pool)
        for pool in config.worker_pools
        for index in range(pool.most_replicas if at_most else pool.replicas)
    ]
    return groups + workers


def plan(needs: Iterable[Need], nodes: Iterable[Node]) -> Plan:
    """Places needs one after the other on the node with the most room left, as Ray would try to."""
    # By number: nodes of one machine, as in tests, may share a name.
    nodes = list(nodes)
    free = [dict(node.resources) for node in nodes]
    places: dict[str, str] = {}
    problems: list[str] = []
    for need in needs:
        bundle = {name: amount * need.ranks for name, amount in need.each.bundle.items()}
        suitable = [index for index, node in enumerate(nodes) if _has_labels(node.labels, need.each.labels)]
        fitting = [index for index in suitable if _fits(bundle, free[index])]
        if not fitting:
            left = [(nodes[index].name, free[index]) for index in suitable]
            problems.append(_problem(need, bundle, left, len(nodes)))
            continue
        best = max(fitting, key=lambda index: (_room(bundle, free[index]), nodes[index].name))
        places[need.name] = nodes[best].name
        for resource, amount in bundle.items():
            free[best][resource] -= amount
    return Plan(places=places, problems=problems)


def _has_labels(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    return all(labels.get(name) == value for name, value in wanted.items())


def _fits(bundle: Mapping[str, float], free: Mapping[str, float]) -> bool:
    return all(free.get(name, 0.0) + 1e-9 >= amount for name, amount in bundle.items())


def _room(bundle: Mapping[str, float], free: Mapping[str, float]) -> float:
    """What would be left of the scarcest resource."""
    return min((free[name] - amount for name, amount in bundle.items()), default=0.0)


def _problem(
    need: Need, bundle: Mapping[str, float], left: Sequence[tuple[str, Mapping[str, float]]], num_nodes: int
) -> str:
    """left: what nodes with its labels have left, of all ``num_nodes``."""
    wanted = ", ".join(_amounts(bundle)) or "nothing"
    if not left:
        labels = ", ".join(f"{name}={value}" for name, value in need.each.labels.items())
        return f"{need.name} wants a node with {labels}, and none of {num_nodes} has these labels"
    offers = "; ".join(
        f"{name} has {', '.join(_amounts({each: free.get(each, 0.0) for each in bundle}))}"
        for name, free in left[:4]
    )
    more = f" and {len(left) - 4} more nodes have no room either" if len(left) > 4 else ""
    return f"{need.name} needs {wanted} on one node; left are: {offers}{more}"


def _amounts(resources: Mapping[str, float]) -> Iterator[str]:
    for name, amount in resources.items():
        yield f"{amount:g} {name}"
