"""``LLM``: a target and its drafter in this very process, with vLLM's shape."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from outrider.actors.draft_engine import TREE_CAPACITY, ModelDraftEngine
from outrider.actors.drafting import DraftEngine, NgramEngine
from outrider.actors.model_runner import ModelRunner
from outrider.actors.target_engine import TargetEngine, TargetModel
from outrider.cluster.speculative_config import SpeculativeConfig
from outrider.models.demo import pair
from outrider.models.loader import context_length, load_model
from outrider.models.numerics import Numerics
from outrider.models.tokenizer import IncrementalDetokenizer, check_same_vocabulary
from outrider.speculation.errors import InvalidConfigError, InvalidRequestError, VocabularyMismatchError
from outrider.speculation.pipelines.serial import TreeShape
from outrider.speculation.request import Completion, Request, StepOutput
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.tree import MAX_TREE_DEPTH
from outrider.speculation.types import IntArray
from outrider.speculation.verifiers.registry import make_verifier

Prompt = str | Sequence[int]


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """All choices for one prompt.

    seed: the one the request was served with; giving it again gives the same tokens.
    """

    prompt: str
    prompt_token_ids: list[int] = field(repr=False)
    outputs: list[Completion]
    seed: int


class LLM:
    """Generates text offline, exactly as the target alone would, and faster.

    model: folder or hub id of the target; None takes the embedded demo pair.
    speculative_config: see ``SpeculativeConfig``; None decodes plainly, but for the
        embedded pair, whose draft model then drafts. ``{}`` looks n-grams up.
    dtype: ``auto`` (as saved; float32 for float16), ``bfloat16``, ``float32`` or ``float64``.
    numerics: ``canonical``, the default, gives a row the same bits whatever runs beside
        it; ``fast`` saves some time and may leave plain decoding at a near-tie.
    max_model_len: tokens of the longest sequence.
    seed: seeds the requests that bring none; None draws fresh ones.

    Raises:
        ModelError: a model cannot be loaded, or the vocabularies differ.
        InvalidConfigError: a setting is not possible.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        speculative_config: Mapping[str, Any] | None = None,
        dtype: str = "auto",
        numerics: str = "canonical",
        max_model_len: int | None = None,
        seed: int | None = None,
    ) -> None:
        if model is None and speculative_config is None:
            speculative_config = {"model": str(pair.DRAFT)}
        config = None if speculative_config is None else SpeculativeConfig.parse(speculative_config)
        kind = _numerics(numerics)
        self.model = load_model(
            str(pair.TARGET) if model is None else model,
            dtype=dtype,
            numerics=kind,
            max_model_len=max_model_len,
        )
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise InvalidConfigError(f"seed must be None or a non-negative integer, not {seed!r}")
        self._seeds = np.random.default_rng(seed)
        shape = TreeShape() if config is None else config.shape
        drafting = None if config is None else self._make_drafting(config, dtype)
        self.engine = TargetEngine(
            TargetModel(
                runner=ModelRunner(self.model.decoder, max_nodes=shape.num_speculative_tokens),
                vocab_size=self.model.vocab_size,
                eos_ids=self.model.eos_ids,
                detokenizer=self._detokenizer,
            ),
            verifier=make_verifier("coupled" if config is None else config.verification),
            drafting=drafting,
            shape=shape,
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | None = None,
        *,
        speculative: bool = True,
    ) -> list[RequestOutput]:
        """One output per prompt, in order. A prompt is text or a list of token ids.

        speculative: False decodes these prompts plainly; the tokens are the same.

        Raises:
            InvalidRequestError: a prompt or parameter cannot be served.
        """
        params = sampling_params or SamplingParams()
        requests = [self.prepare(prompt, params, speculative=speculative) for prompt in _as_list(prompts)]
        return [self._finish(prompt, choices) for prompt, choices in requests]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, speculative: bool = True
    ) -> Iterator[StepOutput]:
        """The steps of one prompt's only choice, as they are made.

        Raises:
            InvalidRequestError: as for ``generate``, or ``n`` is more than 1.
        """
        params = sampling_params or SamplingParams()
        if params.n != 1:
            raise InvalidRequestError(f"n must be 1 to stream, not {params.n}")
        _, (request,) = self.prepare(prompt, params, speculative=speculative)
        return self._steps(request)

    def _steps(self, request: Request) -> Iterator[StepOutput]:
        with self.engine.start(request) as run:
            while not run.finished:
                yield run.step()

    def prepare(
        self, prompt: Prompt, params: SamplingParams, *, speculative: bool = True
    ) -> tuple[str, list[Request]]:
        """The prompt's text and one request per choice, all with the same seed.

        Raises:
            InvalidRequestError: the prompt is empty, too long or has unknown token ids.
        """
        text, ids = self._tokenize(prompt)
        if params.seed is None:
            params = replace(params, seed=int(self._seeds.integers(2**63)))
        requests = [
            Request(prompt_ids=ids, params=params, choice=choice, speculative=speculative)
            for choice in range(params.n)
        ]
        return text, requests

    def complete(self, request: Request, on_step: Callable[[StepOutput], None] | None = None) -> Completion:
        """Serves one prepared request; ``on_step`` sees every step as it is made."""
        ids: list[int] = []
        with self.engine.start(request) as run:
            while not run.finished:
                step = run.step()
                ids += step.token_ids
                if on_step is not None:
                    on_step(step)
        assert step.finish_reason is not None
        return Completion(
            index=request.choice,
            text=run.text,
            token_ids=ids,
            finish_reason=step.finish_reason,
            stop_reason=step.stop_reason,
            stats=run.stats,
        )

    def _finish(self, prompt: str, requests: list[Request]) -> RequestOutput:
        seed = requests[0].params.seed
        assert seed is not None
        return RequestOutput(
            prompt=prompt,
            prompt_token_ids=requests[0].prompt_ids.tolist(),
            outputs=[self.complete(request) for request in requests],
            seed=seed,
        )

    def _tokenize(self, prompt: Prompt) -> tuple[str, IntArray]:
        """Text and token ids of a prompt given as either."""
        tokenizer, limit = self.model.tokenizer, self.model.decoder.max_model_len
        ids = tokenizer.encode(_encodable(prompt)) if isinstance(prompt, str) else _token_ids(prompt)
        if not ids:
            raise InvalidRequestError(f"the prompt {prompt!r} has no tokens")
        vocab = self.model.vocab_size
        if min(ids) < 0 or max(ids) >= vocab:
            strange = next(each for each in ids if not 0 <= each < vocab)
            raise InvalidRequestError(f"prompt token {strange} is not in the vocabulary of {vocab}")
        if len(ids) >= limit:
            raise InvalidRequestError(
                f"the prompt has {len(ids)} tokens and leaves no room in a context of {limit}"
            )
        text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
        return text, np.array(ids, np.int64)

    def _detokenizer(self, request: Request) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(self.model.tokenizer, request.params.skip_special_tokens)

    def _make_drafting(self, config: SpeculativeConfig, dtype: str) -> DraftEngine:
        if config.method == "ngram":
            return NgramEngine(
                prompt_lookup_min=config.prompt_lookup_min,
                prompt_lookup_max=config.prompt_lookup_max,
                num_speculative_tokens=min(config.num_speculative_tokens, MAX_TREE_DEPTH),
            )
        assert config.model is not None
        limit = min(config.max_model_len or self.model.decoder.max_model_len, context_length(config.model))
        draft = load_model(config.model, dtype=dtype, numerics=Numerics.FAST, max_model_len=limit)
        check_same_vocabulary(self.model.tokenizer, draft.tokenizer)
        if draft.vocab_size < self.model.vocab_size:
            raise VocabularyMismatchError(
                f"the draft's head has {draft.vocab_size} tokens, the target's {self.model.vocab_size}"
            )
        return ModelDraftEngine(
            ModelRunner(draft.decoder, max_nodes=TREE_CAPACITY),
            shape=config.shape,
            vocab_size=self.model.vocab_size,
            eos_ids=self.model.eos_ids,
        )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt or several: a string, or a list of numbers, is one."""
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], (int, np.integer))):
        return [cast(Prompt, prompts)]
    return cast(Sequence[Prompt], prompts)


def _encodable(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"the prompt is not valid text: {error}") from None
    return prompt


def _token_ids(prompt: Sequence[int]) -> list[int]:
    if not isinstance(prompt, (Sequence, np.ndarray)):
        raise InvalidRequestError(f"a prompt is text or token ids, and {prompt!r} is neither")
    for each in prompt:
        if isinstance(each, bool) or not isinstance(each, (int, np.integer)):
            raise InvalidRequestError(f"a prompt is text or token ids, and {each!r} is neither")
    return [int(each) for each in prompt]


def _numerics(name: str) -> Numerics:
    try:
        return Numerics(name)
    except ValueError:
        raise InvalidConfigError(f"numerics must be {' or '.join(Numerics)}, not {name!r}") from None
