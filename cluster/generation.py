"""What everything that generates text offers, whether in this process or on a cluster."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from types import TracebackType
from typing import Self, TypeAlias, cast

import numpy as np

from outrider.cluster.model_card import ModelCard
from outrider.speculation.errors import InvalidRequestError, OutriderError
from outrider.speculation.request import Completion, Request, StepOutput
from outrider.speculation.sampling_params import SamplingParams

Prompt: TypeAlias = str | Sequence[int]
"""Text, or token ids."""
OnStep: TypeAlias = Callable[[Request, StepOutput], None]
Results: TypeAlias = Generator[tuple[Request, Completion | OutriderError]]
"""What came of requests, as soon as known. Dropped in the middle, it drops what is in flight."""


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """All choices for one prompt.

    seed: the one the request was served with; giving it again gives the same tokens.
    """

    prompt: str
    prompt_token_ids: list[int] = field(repr=False)
    outputs: list[Completion]
    seed: int


class TextGenerator(ABC):
    """Generates text exactly as its target alone would. End it with ``close`` or a ``with`` block."""

    @abstractmethod
    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        speculative: bool = True,
        pipeline: str | None = None,
    ) -> tuple[str, list[Request]]:
        """The prompt's text and one request per choice, all with the same seed.

        pipeline: ``serial``, ``parallel`` or ``pearl``; what the generator was set up with by default.

        Raises:
            InvalidRequestError: the prompt is empty, too long or has unknown token ids, or there
                are no draft workers for that pipeline.
        """

    @abstractmethod
    def steps(self, request: Request) -> Iterator[StepOutput | Completion]:
        """Serves one prepared request: its steps as they are made, then its completion.

        Raises:
            ModelError: the target gave no token.
        """

    @abstractmethod
    def describe(self) -> ModelCard:
        """What requests for its target are prepared with."""

    @abstractmethod
    def complete_unordered(self, requests: Iterable[Request], on_step: OnStep | None = None) -> Results:
        """Serves prepared requests, several at once; one that fails has an error and ends no other.

        Requests are taken from the iterable as there is room for them. ``on_step`` sees every step of
        each as it is made.
        """

    def complete_all(
        self, requests: Iterable[Request], on_step: OnStep | None = None
    ) -> Iterator[Completion]:
        """As ``complete_unordered``, in the order of the requests.

        Raises:
            OutriderError: one of them failed, and it is its turn.
        """
        order: deque[Request] = deque()
        known: dict[Request, Completion | OutriderError] = {}

        def noted() -> Iterator[Request]:
            for request in requests:
                order.append(request)
                yield request

        with closing(self.complete_unordered(noted(), on_step)) as results:
            for request, result in results:
                known[request] = result
                while order and order[0] in known:
                    done = known.pop(order.popleft())
                    if isinstance(done, OutriderError):
                        raise done
                    yield done

    @abstractmethod
    def failures(self) -> dict[str, str]:
        """A line for people on each process that should help and is out of reach, by its name."""

    @abstractmethod
    def close(self) -> None:
        """Ends what was started; may be called twice."""

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | None = None,
        *,
        speculative: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """One output per prompt, in order. A prompt is text or a list of token ids.

        speculative: False decodes these prompts plainly; the tokens are the same.
        priority: one number per prompt, the lower the sooner; all alike by default.

        Raises:
            InvalidRequestError: a prompt or parameter cannot be served, or there are more or fewer
                priorities than prompts.
        """
        params = sampling_params or SamplingParams()
        prepared = [self.prepare(prompt, params, speculative=speculative) for prompt in _as_list(prompts)]
        if priority is not None and len(priority) != len(prepared):
            raise InvalidRequestError(f"priority must be {len(prepared)} numbers, not {len(priority)}")
        urgency = [0] * len(prepared) if priority is None else [int(each) for each in priority]
        order = sorted(range(len(prepared)), key=urgency.__getitem__)
        requests = [replace(each, priority=urgency[at]) for at in order for each in prepared[at][1]]
        done = self.complete_all(requests)
        outputs = {at: _output(*prepared[at], islice(done, len(prepared[at][1]))) for at in order}
        return [outputs[at] for at in range(len(prepared))]

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
        return (step for step in self.steps(request) if isinstance(step, StepOutput))

    def complete(self, request: Request, on_step: Callable[[StepOutput], None] | None = None) -> Completion:
        """Serves one prepared request; ``on_step`` sees every step as it is made."""
        seen: OnStep | None = None if on_step is None else lambda _, step: on_step(step)
        (done,) = self.complete_all([request], seen)
        return done

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _output(prompt: str, requests: list[Request], done: Iterable[Completion]) -> RequestOutput:
    seed = requests[0].params.seed
    assert seed is not None
    ids = requests[0].prompt_ids.tolist()
    return RequestOutput(prompt=prompt, prompt_token_ids=ids, outputs=list(done), seed=seed)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt or several: a string, or a list of numbers, is one."""
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], (int, np.integer))):
        return [cast(Prompt, prompts)]
    return cast(Sequence[Prompt], prompts)
