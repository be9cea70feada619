"""Which of a text was drafted: the steps of a choice, each with its parts of the text."""

from collections import deque
from typing import Any

from outrider.models.tokenizer import IncrementalDetokenizer, Tokenizer
from outrider.speculation.request import StepOutput


class Marks:
    """Goes along with one choice.

    The text that a step may show lags behind its tokens, by incomplete characters and by what a stop
    string could begin with, and ends before that string. So each token's text waits here, with where it
    came from, until it is shown.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens)
        self._waiting: deque[tuple[int, bool]] = deque()
        """Characters that are still to be shown, and whether they were drafted."""
        self._last_was_drafted = False

    def take(self, step: StepOutput) -> dict[str, Any]:
        """``num_tokens`` and ``num_accepted`` of a step, and the ``parts`` of its text."""
        if step.token_ids:
            self._last_was_drafted = step.num_accepted == len(step.token_ids)
        accepted, own = step.token_ids[: step.num_accepted], step.token_ids[step.num_accepted :]
        self._waiting.append((len(self._detokenizer.push(accepted)), True))
        self._waiting.append((len(self._detokenizer.push(own)), False))
        if step.finish_reason is not None:
            self._waiting.append((len(self._detokenizer.flush()), self._last_was_drafted))
        return {
            "num_tokens": len(step.token_ids),
            "num_accepted": step.num_accepted,
            "parts": [{"text": text, "drafted": drafted} for text, drafted in self._shown(step.text)],
        }

    def _shown(self, text: str) -> list[tuple[str, bool]]:
        """Divides what a step shows."""
        parts: list[tuple[str, bool]] = []
        while text and self._waiting:
            length, drafted = self._waiting.popleft()
            if length > len(text):
                self._waiting.appendleft((length - len(text), drafted))
            if length:
                parts.append((text[:length], drafted))
            text = text[length:]
        if text:
            # A stop token that is hidden can change how bytes before it decode.
            parts.append((text, False))
        return parts
