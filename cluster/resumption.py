"""What a caller has seen of a request, so that another target can go on with it unnoticed.

A target gives the same tokens for the same request, whoever it is and whatever its trees look
like. So a request whose target died is served anew, and what was seen before is left out.
"""

from collections.abc import Iterator
from dataclasses import replace

from outrider.speculation.errors import TargetLostError
from outrider.speculation.request import Completion, Request, StepEvent, StepOutput

MOST_FAILOVERS = 3
"""Targets that a request may lose and still be opened again."""


class Progress:
    """One request. ``restart`` before it is served again."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.finished = False
        self._lost = 0
        self._tokens = self._characters = 0
        """That the caller has seen."""
        self._tokens_again = self._characters_again = 0
        """That the present target has sent."""

    def restart(self) -> None:
        """A target begins with it."""
        self._tokens_again = self._characters_again = 0

    def lose(self) -> TargetLostError | None:
        """Its target died; an error if it is not to be served again, for it may be what ends them."""
        self._lost += 1
        if self._lost <= MOST_FAILOVERS:
            return None
        self.finished = True
        return TargetLostError(f"{self._lost} targets died while they served this request")

    def take(self, event: StepEvent) -> Iterator[StepOutput | Completion]:
        """What of an event is new to the caller.

        Raises:
            OutriderError: the request failed.
        """
        if event.error is not None:
            self.finished = True
            raise event.error
        if event.output is not None and (fresh := self._unseen(event.output)) is not None:
            yield fresh
        if event.completion is not None:
            self.finished = True
            yield event.completion

    def _unseen(self, output: StepOutput) -> StepOutput | None:
        old_tokens = min(len(output.token_ids), max(0, self._tokens - self._tokens_again))
        old_characters = min(len(output.text), max(0, self._characters - self._characters_again))
        self._tokens_again += len(output.token_ids)
        self._characters_again += len(output.text)
        self._tokens = max(self._tokens, self._tokens_again)
        self._characters = max(self._characters, self._characters_again)
        if not old_tokens and not old_characters:
            return output
        all_old = old_tokens == len(output.token_ids) and old_characters == len(output.text)
        if all_old and output.finish_reason is None:
            return None
        return replace(
            output,
            token_ids=output.token_ids[old_tokens:],
            num_accepted=max(0, output.num_accepted - old_tokens),
            text=output.text[old_characters:],
            logprobs=None if output.logprobs is None else output.logprobs[old_tokens:],
            # They came with the first token, which the caller has seen.
            prompt_logprobs=None,
        )
