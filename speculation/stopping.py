"""When a request ends, and which text it has: a state machine without tensors.

It looks at tokens one by one wherever their grouping could show, so the outcome does not
depend on how many tokens were committed at once.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from outrider.speculation.errors import InvalidRequestError
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.types import FinishReason


class TextSource(Protocol):
    """An incremental detokeniser; the text is that of all its answers joined."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain once ``ids`` follow what was pushed before."""
        ...

    def flush(self) -> str:
        """The rest of the text; nothing is pushed afterwards."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StopOutcome:
    """What became of the pushed tokens.

    num_kept: how many of them belong to the output; the rest come after its end.
    finish_reason: None while the request goes on.
    stop_reason: the stop string or the id out of ``stop_token_ids`` that ended it; None
        for EOS and for lengths, as in vLLM.
    """

    num_kept: int
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


def ending_ids(params: SamplingParams, eos_ids: Collection[int]) -> frozenset[int]:
    """Every token that ends the request's output."""
    return frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos_ids)


class StopChecker:
    """Finds the end of one request's output.

    The output ends with the first token that is EOS or a stop token, that completes a
    stop string, or that reaches ``max_tokens`` or the context length. If several hold, a
    stop string comes first, then EOS, then stop tokens, then lengths. The first
    ``min_tokens`` tokens end nothing but at the context length.

    A stop token stays in the output. Text ends before a stop token or a stop string, or
    behind it with ``include_stop_str_in_output``, as in vLLM.

    eos_ids: the model's; ``ignore_eos`` is applied here.
    prompt_length, max_model_len: tokens.

    Raises:
        InvalidRequestError: the prompt leaves no room for output.
    """

    def __init__(
        self,
        params: SamplingParams,
        eos_ids: Collection[int],
        prompt_length: int,
        max_model_len: int,
        detokenizer: TextSource,
    ) -> None:
        if prompt_length >= max_model_len:
            raise InvalidRequestError(
                f"prompt must be shorter than the context length {max_model_len}, not {prompt_length} tokens"
            )
        self._eos_ids = frozenset(() if params.ignore_eos else eos_ids)
        self._stop_ids = ending_ids(params, eos_ids)
        self._limit = min(params.max_tokens, max_model_len - prompt_length)
        self._min_tokens = params.min_tokens
        self._stops = tuple(params.stop)
        self._longest_stop = max(map(len, self._stops), default=0)
        self._include_stop = params.include_stop_str_in_output
        self._detokenizer = detokenizer
        self._num_tokens = 0
        self._text = ""
        self._num_taken = 0
        self._finished = False

    @property
    def num_tokens(self) -> int:
        """Output tokens so far."""
        return self._num_tokens

    @property
    def text(self) -> str:
        """The text so far; what may turn out to be a stop string is in it until it does."""
        return self._text

    def push(self, tokens: Sequence[int]) -> StopOutcome:
        """Takes committed tokens, in order; nothing may follow the end."""
        assert not self._finished, "tokens after the end of the request"
        outcome = self._end_by_token(tokens)
        hidden = outcome.finish_reason is FinishReason.STOP and not self._include_stop
        shown = tokens[: outcome.num_kept - hidden]
        if self._stops:
            outcome = self._end_by_string(shown, outcome)
        else:
            self._text += self._detokenizer.push(shown)
            if outcome.finish_reason is not None:
                self._text += self._detokenizer.flush()
        self._num_tokens += outcome.num_kept
        self._finished = outcome.finish_reason is not None
        return outcome

    def take_text(self) -> str:
        """The text since the last call that is safe to stream: no later token changes it."""
        end = len(self._text)
        if not (self._finished or self._include_stop):
            end -= self._held_back()
        new = self._text[self._num_taken : end]
        self._num_taken = end
        return new

    def _end_by_token(self, tokens: Sequence[int]) -> StopOutcome:
        """The end by EOS, a stop token or a length."""
        room = self._limit - self._num_tokens
        if not self._stop_ids.isdisjoint(tokens):
            shielded = max(0, self._min_tokens - self._num_tokens)
            for index in range(shielded, min(room, len(tokens))):
                if tokens[index] in self._stop_ids:
                    reason = None if tokens[index] in self._eos_ids else int(tokens[index])
                    return StopOutcome(
                        num_kept=index + 1, finish_reason=FinishReason.STOP, stop_reason=reason
                    )
        if len(tokens) >= room:
            return StopOutcome(num_kept=room, finish_reason=FinishReason.LENGTH)
        return StopOutcome(num_kept=len(tokens))

    def _end_by_string(self, tokens: Sequence[int], outcome: StopOutcome) -> StopOutcome:
        """The end by a stop string within ``tokens``, or else ``outcome``. Extends the text."""
        for index, token in enumerate(tokens):
            text = self._detokenizer.push((token,))
            stop = self._extend(text, index + 1)
            if stop is not None:
                return StopOutcome(num_kept=index + 1, finish_reason=FinishReason.STOP, stop_reason=stop)
        if outcome.finish_reason is not None:
            stop = self._extend(self._detokenizer.flush(), outcome.num_kept)
            if stop is not None:
                return StopOutcome(
                    num_kept=outcome.num_kept, finish_reason=FinishReason.STOP, stop_reason=stop
                )
        return outcome

    def _extend(self, text: str, count: int) -> str | None:
        """Adds the text of the ``count``-th new token; the stop string that it completes, cut off."""
        old_length = len(self._text)
        self._text += text
        if self._num_tokens + count <= self._min_tokens:
            return None
        found = self._find_stop(old_length)
        if found is None:
            return None
        start, stop = found
        self._text = self._text[: start + len(stop) if self._include_stop else start]
        return stop

    def _find_stop(self, old_length: int) -> tuple[int, str] | None:
        """Start and string of the stop that ends first behind ``old_length``; the longest of these."""
        found = [
            (start, stop)
            for stop in self._stops
            if (start := self._text.find(stop, max(0, old_length - len(stop) + 1))) >= 0
        ]
        return min(found, key=lambda match: (match[0] + len(match[1]), match[0]), default=None)

    def _held_back(self) -> int:
        """Length of the longest end of the text that a stop string could begin with."""
        for length in range(min(len(self._text), self._longest_stop - 1), 0, -1):
            end = self._text[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stops):
                return length
        return 0
