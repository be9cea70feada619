"""Probes on the nodes of the Ray cluster that this process is connected to."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from outrider.cluster.placement import Node
from outrider.cluster.probe import Probe

ANSWER_SECONDS = 60.0
"""For a probe's process to start and import PyTorch, on a busy node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteProbe:
    """A ``Probe`` on a node; ``call`` waits for what its method returns."""

    node: Node
    actor: Any

    def call(self, method: str, *arguments: Any) -> Any:
        """
        Raises:
            Exception: what the method raised, or Ray's if the node does not answer.
        """
        return ray.get(self.begin(method, *arguments), timeout=ANSWER_SECONDS)

    def begin(self, method: str, *arguments: Any) -> Any:
        """Does not wait; for ``finish``."""
        return getattr(self.actor, method).remote(*arguments)


def finish(begun: list[Any]) -> list[Any]:
    """Waits for calls that run at the same time."""
    results: list[Any] = ray.get(begun, timeout=ANSWER_SECONDS)
    return results


@contextmanager
def probes(
    nodes: Sequence[tuple[str, Node]], interface: str | None, *, loopback: bool
) -> Iterator[list[RemoteProbe]]:
    """One on each of these nodes, given with their ids in Ray.

    loopback: where the whole cluster is this machine.
    """
    actor_class: Any = ray.remote(_LocatedProbe)
    actors = [
        RemoteProbe(
            node=node,
            actor=actor_class.options(
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            ).remote(interface, loopback),
        )
        for node_id, node in nodes
    ]
    try:
        yield actors
    finally:
        for each in actors:
            ray.kill(each.actor)


class _LocatedProbe(Probe):
    """Told by Ray where it is."""

    def __init__(self, interface: str | None, loopback: bool) -> None:
        super().__init__(interface, "127.0.0.1" if loopback else ray.util.get_node_ip_address())
