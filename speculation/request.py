"""One request on its way through an engine, and what it gives back."""

from dataclasses import dataclass, field
from uuid import uuid4

from outrider.speculation.errors import OutriderError
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.statistics import SpeculationStatistics
from outrider.speculation.types import FinishReason, IntArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One choice for one prompt.

    prompt_ids: int64 ``[length]``. params: with a seed. choice: which of the ``n`` choices.
    speculative: whether the engine's drafter may help; the tokens are the same either way.
    num_speculative_tokens: most nodes of its tree to verify in a step; the engine's own limit by default.
    prediction_ids: int64 ``[length]``, a text that the caller expects; it then drafts, and nothing else.
    pipeline: how drafting and verification take turns, see ``pipelines.registry``; the engine's
        own by default.
    priority: of two that wait, the one with the lower goes first.
    request_id: what log lines call it.
    """

    prompt_ids: IntArray
    params: SamplingParams
    choice: int = 0
    speculative: bool = True
    num_speculative_tokens: int | None = None
    prediction_ids: IntArray | None = None
    pipeline: str | None = None
    priority: int = 0
    request_id: str = field(default_factory=lambda: uuid4().hex[:16])


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How probable a token was to the target; see ``logprobs``.

    logprob: its natural logarithm. rank: 1 for the most probable token of all.
    top_ids, top_logprobs: the most probable tokens, as many as were asked for, the best first.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What one engine step added to a request.

    token_ids: committed tokens; the first ``num_accepted`` were drafted, the last is the
        target's own unless the request ended before it.
    text: what became safe to stream; it may lag behind the tokens.
    logprobs: one entry per token, where the request asks for them.
    prompt_logprobs: one entry per token of the prompt, likewise, with a request's first output only.
        The first entry is None: nothing predicts the first token.
    """

    token_ids: list[int]
    num_accepted: int
    text: str
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None


@dataclass(slots=True, kw_only=True)
class Completion:
    """One finished choice of a request; ``logprobs`` and ``prompt_logprobs`` as in ``StepOutput``."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: int | str | None
    stats: SpeculationStatistics = field(repr=False)
    logprobs: list[TokenLogprobs] | None = field(default=None, repr=False)
    prompt_logprobs: list[TokenLogprobs | None] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEvent:
    """What a step brought one request of a call.

    index: of the request among the call's. In its last event a request has a completion or an
    error.
    """

    index: int
    output: StepOutput | None
    completion: Completion | None = None
    error: OutriderError | None = None
