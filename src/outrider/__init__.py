"""Outrider: speculative decoding that gives the target's own tokens, faster."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outrider.cluster.llm import LLM
    from outrider.cluster.ray_cluster import Cluster
    from outrider.speculation.sampling_params import SamplingParams

__all__ = ["LLM", "Cluster", "SamplingParams"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Loading a network library takes seconds; the command line's --help need not wait for it.
    if name == "LLM":
        from outrider.cluster.llm import LLM

        return LLM
    if name == "Cluster":
        from outrider.cluster.ray_cluster import Cluster

        return Cluster
    if name == "SamplingParams":
        from outrider.speculation.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
