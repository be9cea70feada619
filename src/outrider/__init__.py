"""Outrider: speculative decoding that gives the target's own tokens, faster."""

from typing import TYPE_CHECKING, Any

from outrider.speculation.sampling_params import SamplingParams

if TYPE_CHECKING:
    from outrider.cluster.llm import LLM

__all__ = ["LLM", "SamplingParams"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Loading a network library takes seconds; who only wants a parameter class need not wait.
    if name == "LLM":
        from outrider.cluster.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
