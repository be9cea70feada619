"""``outrider doctor``: whether the nodes of a cluster fit together, measured."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from outrider.cluster.checks import check
from outrider.cluster.cluster_config import ClusterConfig
from outrider.cluster.probe import NodeReport
from outrider.cluster.ray_runtime import local_ray
from outrider.cluster.standing import attached, find_local, standing_ray

if TYPE_CHECKING:
    from outrider.cluster.ray_nodes import RemoteProbe

MOST_SKEW = 0.5
"""Seconds between clocks above which logs of two nodes cannot be read side by side."""
SLOW_ROUND_TRIP = 0.005
"""Seconds; above it drafting ahead hides less than it should."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at. verdict: ``ok``, ``warning`` or ``problem``."""

    what: str
    verdict: str
    detail: str


@dataclass(slots=True, kw_only=True)
class Diagnosis:
    """findings: in the order they were made. nodes: what each said of itself."""

    findings: list[Finding] = field(default_factory=list)
    nodes: list[NodeReport] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether nothing stands in the way of a cluster."""
        return all(finding.verdict != "problem" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For a bug report."""
        return {
            "findings": [asdict(each) for each in self.findings],
            "nodes": [asdict(n) for n in self.nodes],
        }


def examine(config: ClusterConfig) -> Diagnosis:
    """Looks at every node, and lets them talk to each other.

    Raises:
        ClusterError: there is no Ray cluster at the address.
    """
    diagnosis = Diagnosis()
    _look(diagnosis, "configuration and models", lambda: _fits(config))
    with _ray(config), _probes(config) as probes:
        diagnosis.nodes = [probe.call("report") for probe in probes]
        _look(diagnosis, "versions", lambda: _same_versions(diagnosis.nodes))
        for report in diagnosis.nodes:
            diagnosis.findings.append(_describe(report))
        _look(diagnosis, "clocks", lambda: _skew(probes))
        for one, other in _neighbours(probes):
            what = f"gRPC {one.node.name} to {other.node.name}"
            _look(diagnosis, what, lambda one=one, other=other: _round_trip(one, other))  # type: ignore[misc]
        _look(diagnosis, f"gloo all-reduce over {len(probes)} processes", lambda: _all_reduce(probes))
    return diagnosis


def _look(diagnosis: Diagnosis, what: str, find: Callable[[], tuple[str, str]]) -> None:
    """Notes what was found, whatever happens meanwhile: the other findings count all the more then."""
    try:
        verdict, detail = find()
    except Exception as error:
        lines = str(error).strip().splitlines()
        verdict, detail = "problem", lines[-1] if lines else type(error).__name__
    diagnosis.findings.append(Finding(what=what, verdict=verdict, detail=detail))


def _fits(config: ClusterConfig) -> tuple[str, str]:
    report = check(config)
    if report.problems:
        return "problem", "; ".join(report.problems)
    return "ok", ", ".join(f"{name} on {node}" for name, node in report.plan.places.items())


@contextmanager
def _ray(config: ClusterConfig) -> Iterator[None]:
    standing = find_local(config.name) if config.address == "local" else None
    if standing is not None:
        with standing_ray(standing):
            yield
    elif config.address == "local":
        with local_ray():
            yield
    else:
        with attached(config):
            yield


@contextmanager
def _probes(config: ClusterConfig) -> Iterator[list["RemoteProbe"]]:
    """One on every node; two where there is one node, so that they have somebody to talk to."""
    from outrider.cluster.ray_client import nodes
    from outrider.cluster.ray_nodes import probes

    local = config.address == "local"
    found = list(nodes().items())
    with probes(found if len(found) > 1 else found * 2, config.network.interface, loopback=local) as started:
        yield started


def _same_versions(nodes: list[NodeReport]) -> tuple[str, str]:
    first = nodes[0]
    line = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    for node in nodes[1:]:
        different = [
            f"{name} {version} on {node.host}, {first.versions[name]} on {first.host}"
            for name, version in node.versions.items()
            if version != first.versions[name]
        ]
        if node.python.rpartition(".")[0] != first.python.rpartition(".")[0]:
            different.append(f"Python {node.python} on {node.host}, {first.python} on {first.host}")
        if different:
            return "problem", "; ".join(different)
    missing = [name for name, version in first.versions.items() if version == "missing"]
    return ("problem", f"missing: {', '.join(missing)}") if missing else ("ok", line)


def _describe(node: NodeReport) -> Finding:
    gpus = ", ".join(node.gpus) or "no GPU"
    detail = (
        f"{node.address}, Python {node.python}, {node.cpus} CPUs ({node.native_kernel}), "
        f"{node.memory_gib:.0f} GiB, {gpus}; can listen, for instance on port {node.free_port}"
    )
    slow = node.native_kernel == "PyTorch's own"
    remark = "; without the native kernels, which need a C++ compiler at install" if slow else ""
    return Finding(what=f"node {node.host}", verdict="warning" if slow else "ok", detail=detail + remark)


def _skew(probes: list["RemoteProbe"]) -> tuple[str, str]:
    """The largest difference from our clock, in the middle of each question's round trip."""
    worst = 0.0
    for probe in probes:
        asked = time.time()
        theirs = probe.call("clock")
        worst = max(worst, abs(theirs - (asked + time.time()) / 2))
    verdict = "ok" if worst < MOST_SKEW else "warning"
    return verdict, f"at most {worst * 1e3:.1f} ms apart"


def _neighbours(probes: list["RemoteProbe"]) -> Iterator[tuple["RemoteProbe", "RemoteProbe"]]:
    """Each to the next, around the ring: every node both calls and is called."""
    for index, probe in enumerate(probes):
        yield probe, probes[(index + 1) % len(probes)]


def _round_trip(one: "RemoteProbe", other: "RemoteProbe") -> tuple[str, str]:
    seconds = one.call("round_trip", other.call("listen"))
    verdict = "ok" if seconds < SLOW_ROUND_TRIP else "warning"
    return verdict, f"{seconds * 1e3:.2f} ms there and back"


def _all_reduce(probes: list["RemoteProbe"]) -> tuple[str, str]:
    from outrider.cluster.ray_nodes import finish

    port = probes[0].call("open_group")
    address = probes[0].call("report").address
    seconds = finish(
        [probe.begin("all_reduce", rank, len(probes), address, port) for rank, probe in enumerate(probes)]
    )
    return "ok", f"1 MiB in {max(seconds) * 1e3:.2f} ms"
