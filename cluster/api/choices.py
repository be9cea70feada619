"""What has come of a call: its choices, and how much of everything they took."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from outrider.cluster.api.calls import Call
from outrider.speculation.request import Completion, Request, StepOutput, TokenLogprobs
from outrider.speculation.statistics import SpeculationStatistics


@dataclass(slots=True)
class Choice:
    """One text as far as it has come."""

    index: int
    request: Request
    prompt: str
    num_tokens: int = 0
    completion: Completion | None = None
    num_characters: int = 0
    """Of the texts of tokens that were sent with their logprobs."""
    steps: list[StepOutput] = field(default_factory=list)
    """Kept where the call wants them in its whole reply."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one lot of steps added to a choice; all of it, where a choice is sent as a whole.

    steps: of a whole choice, only where they were kept. logprobs: of the tokens, where asked for.
    prompt_logprobs: in the choice's first piece.
    """

    choice: Choice
    text: str
    token_ids: list[int]
    steps: list[StepOutput]
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs | None] | None
    first: bool
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Usage:
    """Tokens of a call, in OpenAI's terms."""

    prompt_tokens: int
    completion_tokens: int = 0
    stats: SpeculationStatistics = field(default_factory=SpeculationStatistics)
    predicted: bool = False

    def as_dict(self) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": min(self.stats.cached_tokens, self.prompt_tokens)},
        }
        if self.predicted:
            usage["completion_tokens_details"] = {
                "accepted_prediction_tokens": self.stats.accepted_prediction_tokens,
                "rejected_prediction_tokens": self.stats.rejected_prediction_tokens,
            }
        return usage


class Choices:
    """All choices of one call. keeps_steps: for ``wholes``."""

    def __init__(self, call: Call, *, keeps_steps: bool = False) -> None:
        self.call, self._keeps_steps = call, keeps_steps
        self.all = [
            Choice(index, request, call.prompts[index // call.n])
            for index, request in enumerate(call.requests)
        ]
        self.usage = Usage(call.prompt_tokens, predicted=call.requests[0].prediction_ids is not None)

    def take(self, events: Iterable[tuple[int, StepOutput | Completion]]) -> Iterator[Piece]:
        """What a lot brought: a piece for each choice that it brought something."""
        outputs: dict[int, list[StepOutput]] = {}
        for index, item in events:
            if isinstance(item, Completion):
                self.all[index].completion = item
                self.usage.stats.merge(item.stats)
            else:
                outputs.setdefault(index, []).append(item)
        for index, steps in outputs.items():
            yield self._piece(self.all[index], steps)

    def complete(self, index: int, done: Completion) -> None:
        """A choice whose steps nobody looked at is complete."""
        self.all[index].completion = done
        self.usage.stats.merge(done.stats)
        self.usage.completion_tokens += len(done.token_ids) if self.call.keeps_text else 0

    def wholes(self) -> Iterator[Piece]:
        """Every choice in one piece, when all are complete."""
        for choice in self.all:
            done = choice.completion
            assert done is not None
            yield Piece(
                choice=choice,
                text=done.text,
                token_ids=done.token_ids,
                steps=choice.steps,
                logprobs=done.logprobs,
                prompt_logprobs=done.prompt_logprobs,
                first=True,
                finish_reason=done.finish_reason,
                stop_reason=done.stop_reason,
            )

    def _piece(self, choice: Choice, steps: list[StepOutput]) -> Piece:
        first = choice.num_tokens == 0
        ids = [token for step in steps for token in step.token_ids]
        asked = [step.logprobs for step in steps if step.logprobs is not None]
        prompt = next((step.prompt_logprobs for step in steps if step.prompt_logprobs is not None), None)
        choice.num_tokens += len(ids)
        self.usage.completion_tokens += len(ids) if self.call.keeps_text else 0
        if self._keeps_steps:
            choice.steps += steps
        return Piece(
            choice=choice,
            text="".join(step.text for step in steps),
            token_ids=ids,
            steps=steps,
            logprobs=[each for part in asked for each in part] if asked else None,
            prompt_logprobs=prompt,
            first=first,
            finish_reason=steps[-1].finish_reason,
            stop_reason=steps[-1].stop_reason,
        )
