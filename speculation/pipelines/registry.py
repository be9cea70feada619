"""Pipelines with a drafter in another process, by the names that users give."""

from collections.abc import Callable

from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.pipelines.parallel import ParallelPipeline
from outrider.speculation.pipelines.pearl import PearlPipeline
from outrider.speculation.pipelines.remote_serial import RemoteSerialPipeline
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.replication.messages import NO_LIMIT, GrowthLimits

PIPELINES: dict[
    str, Callable[[TreeShape, CostEstimates], ParallelPipeline | RemoteSerialPipeline | PearlPipeline]
] = {
    "parallel": ParallelPipeline,
    "serial": RemoteSerialPipeline,
    "pearl": PearlPipeline,
}


def num_drafters(pipeline: str, per_request: int) -> int:
    """How many drafters at once a request is given that may have so many."""
    return 1 if pipeline == "pearl" else per_request


def growth_limits(pipeline: str, shape: TreeShape) -> GrowthLimits:
    """How far a drafter's trees may grow: all the time, so many steps, or a chain of so many steps."""
    chain = pipeline == "pearl"
    return GrowthLimits(
        width=1 if chain else shape.width,
        children=1 if chain else shape.children,
        steps=NO_LIMIT if pipeline == "parallel" else shape.depth,
        # A window is drafted to its end, however unlikely that is.
        min_score=0.0 if chain else shape.min_score,
    )
