"""Pipelines with a drafter in another process, by the names that users give."""

from collections.abc import Callable

from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.pipelines.parallel import ParallelPipeline
from outrider.speculation.pipelines.remote_serial import RemoteSerialPipeline
from outrider.speculation.pipelines.shape import TreeShape

PIPELINES: dict[str, Callable[[TreeShape, CostEstimates], ParallelPipeline | RemoteSerialPipeline]] = {
    "parallel": ParallelPipeline,
    "serial": RemoteSerialPipeline,
}
