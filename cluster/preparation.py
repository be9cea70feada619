"""From a prompt to requests that an engine can serve; all that takes is the tokenizer and a few numbers."""

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from outrider.cluster.generation import Prompt
from outrider.models.tokenizer import Tokenizer
from outrider.speculation.errors import InvalidRequestError
from outrider.speculation.request import Request
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.types import IntArray


class Preparation:
    """One model's; any thread may use it.

    vocab_size: tokens that can be chosen. seeds: of requests that bring none.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, vocab_size: int, max_model_len: int, seeds: np.random.Generator
    ) -> None:
        self.tokenizer, self.vocab_size, self.max_model_len = tokenizer, vocab_size, max_model_len
        self._seeds, self._drawing = seeds, threading.Lock()

    def requests(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        speculative: bool = True,
        pipeline: str | None = None,
    ) -> tuple[str, list[Request]]:
        """The prompt's text and one request per choice, all with the same seed.

        Raises:
            InvalidRequestError: the prompt is empty, too long or has unknown token ids, or parameters
                name such ids.
        """
        text, ids = self._tokenized(prompt)
        if params.bad_words:
            words = (*params.bad_words_token_ids, *word_ids(self.tokenizer, params.bad_words))
            params = replace(params, bad_words=(), bad_words_token_ids=words)
        params.check_vocabulary(self.vocab_size)
        if params.seed is None:
            with self._drawing:
                params = replace(params, seed=int(self._seeds.integers(2**63)))
        requests = [
            Request(prompt_ids=ids, params=params, choice=choice, speculative=speculative, pipeline=pipeline)
            for choice in range(params.n)
        ]
        return text, requests

    def _tokenized(self, prompt: Prompt) -> tuple[str, IntArray]:
        """Text and token ids of a prompt given as either."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else _token_ids(prompt)
        if not ids:
            raise InvalidRequestError(f"the prompt {prompt!r} has no tokens")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            strange = next(each for each in ids if not 0 <= each < self.vocab_size)
            raise InvalidRequestError(f"prompt token {strange} is not in the vocabulary of {self.vocab_size}")
        if len(ids) >= self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {len(ids)} tokens and leaves no room in a context of {self.max_model_len}"
            )
        text = prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)
        return text, np.array(ids, np.int64)


def word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> list[list[int]]:
    """Each word's tokens, and those that it has behind a space if that is other ones, as vLLM does it.

    Raises:
        InvalidRequestError: one is blank.
    """
    found = []
    for word in words:
        if not word.strip():
            raise InvalidRequestError(f"bad_words must not be blank, as {word!r} is")
        bare, spaced = (
            tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False) for prefix in ("", " ")
        )
        found.append(bare)
        if bare[:1] != spaced[:1] and len(bare) == len(spaced):
            found.append(spaced)
    return found


def _token_ids(prompt: Sequence[int]) -> list[int]:
    if not isinstance(prompt, (Sequence, np.ndarray)):
        raise InvalidRequestError(f"a prompt is text or token ids, and {prompt!r} is neither")
    for each in prompt:
        if isinstance(each, bool) or not isinstance(each, (int, np.integer)):
            raise InvalidRequestError(f"a prompt is text or token ids, and {each!r} is neither")
    return [int(each) for each in prompt]
