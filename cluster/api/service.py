"""The models behind one API, and the life of a call to one of them."""

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from outrider.cluster.api.admission import Admission, OverloadedError
from outrider.cluster.api.backend import Backend, UnavailableError
from outrider.cluster.api.calls import Call, Limits, chat_call, completion_call
from outrider.cluster.api.choices import Choices, Piece
from outrider.cluster.api.fields import ChatBody, CompletionBody, GenerationBody
from outrider.cluster.api.guards import error_body
from outrider.cluster.api.metrics import Metrics, Mirror
from outrider.cluster.api.replies import ChatFormat, CompletionFormat, Format
from outrider.cluster.model_card import ModelCard
from outrider.cluster.preparation import Preparation
from outrider.speculation.errors import OutriderError
from outrider.speculation.request import Completion

log = logging.getLogger(__name__)

INTERVAL = 0.04
"""Seconds between two chunks of a stream after its first: every chunk costs the engine's process time."""
WAITING_PER_SLOT = 4.0
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class UnknownModelError(OutriderError):
    """No such model is served."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How a model is offered. names: it is served under, the first in replies to whoever gives none.

    chat_template: Jinja, in place of the model's own. seed: of the requests that bring none.
    """

    names: tuple[str, ...]
    chat_template: str | None = None
    limits: Limits = field(default_factory=Limits)
    waiting_per_slot: float = WAITING_PER_SLOT
    seed: int | None = None

    def within(self, max_tokens: int | None, max_choices: int | None) -> "ModelSettings":
        """With limits that are no wider than these."""
        return replace(self, limits=self.limits.within(max_tokens, max_choices))


class OfferedModel:
    """One model as clients see it. Encoding texts happens here, so that targets need not be asked."""

    def __init__(self, card: ModelCard, settings: ModelSettings) -> None:
        self.settings = settings
        self.tokenizer = card.tokenizer()
        self.preparation = Preparation(
            self.tokenizer,
            vocab_size=card.vocab_size,
            max_model_len=card.max_model_len,
            seeds=np.random.default_rng(secrets.randbits(128) if settings.seed is None else settings.seed),
        )
        self.fingerprint = f"outrider-{card.dtype}-{card.numerics}"

    @property
    def name(self) -> str:
        return self.settings.names[0]

    def call(self, body: GenerationBody) -> Call:
        """What is asked of the engine.

        Raises:
            InvalidRequestError: it cannot be served.
        """
        if isinstance(body, ChatBody):
            return chat_call(body, self.preparation, self.settings.chat_template, self.settings.limits)
        assert isinstance(body, CompletionBody)
        return completion_call(body, self.preparation, self.settings.limits)

    def format(self, body: GenerationBody, choices: Choices) -> Format:
        kind = ChatFormat if isinstance(body, ChatBody) else CompletionFormat
        return kind(body, choices, self.tokenizer, body.model or self.name, self.fingerprint)


class ServedModel(OfferedModel):
    """A model, and who serves it."""

    def __init__(self, backend: Backend, settings: ModelSettings) -> None:
        super().__init__(backend.card, settings)
        self.backend = backend
        self.admission = Admission(
            lambda: backend.serving * backend.card.max_num_seqs, waiting_per_slot=settings.waiting_per_slot
        )

    def require_room(self) -> None:
        """
        Raises:
            UnavailableError: nobody serves the model.
            OverloadedError: too many wait already.
        """
        if not self.backend.serving:
            raise UnavailableError(f"no target of {self.name} serves now")
        self.admission.require_room()


class Service:
    """All models of a server. mirror: see ``Metrics``."""

    def __init__(self, models: Sequence[ServedModel], mirror: Mirror | None = None) -> None:
        self.models = list(models)
        self.by_name = {name: model for model in models for name in model.settings.names}
        self.metrics = Metrics([model.name for model in models], mirror)

    def model(self, name: str | None) -> ServedModel:
        """The one of that name, or the only one.

        Raises:
            UnknownModelError: there is none.
        """
        if name is None and len(self.models) == 1:
            return self.models[0]
        if name is None or name not in self.by_name:
            raise unknown_model(name, self.by_name)
        return self.by_name[name]

    def offered_name(self, name: object) -> str:
        """What the model of that name is counted under; nothing, where several might be meant."""
        known = self.by_name.get(name) if isinstance(name, str) else None
        if known is None and len(self.models) == 1:
            known = self.models[0]
        return "" if known is None else known.name

    def require_room(self) -> None:
        """For a call to a model that is not known yet.

        Raises:
            UnavailableError: nobody serves any model.
            OverloadedError: no model has room.
        """
        refusals: list[OutriderError] = []
        for model in self.models:
            try:
                model.require_room()
            except (UnavailableError, OverloadedError) as error:
                refusals.append(error)
        if len(refusals) == len(self.models):
            # Whoever is only busy has room sooner.
            raise next((each for each in refusals if isinstance(each, OverloadedError)), refusals[0])

    async def reply(self, model: ServedModel, body: GenerationBody) -> dict[str, Any]:
        """The whole reply."""
        choices = Choices(await self._call(model, body), keeps_steps=body.return_draft_tokens)
        async with aclosing(self._pieces(model, choices, interval=60.0)) as pieces:
            async for _ in pieces:
                pass
        return model.format(body, choices).whole()

    async def stream(self, model: ServedModel, body: GenerationBody) -> AsyncGenerator[str]:
        """The reply as server-sent events. The first ``anext`` returns once the first piece is there.

        A call that cannot be served raises then; what goes wrong later is told in the stream.
        """
        choices = Choices(await self._call(model, body))
        form = model.format(body, choices)
        begun = False
        try:
            async with aclosing(self._pieces(model, choices, INTERVAL)) as pieces:
                async for piece in pieces:
                    if piece.token_ids or piece.text or piece.finish_reason is not None:
                        begun = True
                        yield _event(form.chunk(piece))
        except OutriderError as error:
            if not begun:
                raise
            log.warning("a stream ended early: %s", error)
            yield _event(error_body(str(error), "server_error", code=500))
        else:
            if body.stream_options.include_usage:
                yield _event(form.last_chunk())
        yield "data: [DONE]\n\n"

    async def close(self) -> None:
        for model in self.models:
            await model.backend.close()

    async def _call(self, model: ServedModel, body: GenerationBody) -> Call:
        """As ``ServedModel.call``. Whoever cannot be let in hears so before a text is encoded for them.

        Raises:
            UnavailableError: nobody serves the model.
            OverloadedError: too many wait already.
        """
        model.require_room()
        with model.admission.entering():
            # Encoding a long text takes a while, and streams go on meanwhile.
            return await asyncio.to_thread(model.call, body)

    async def _pieces(self, model: ServedModel, choices: Choices, interval: float) -> AsyncGenerator[Piece]:
        """Everything that comes of a call, counted."""
        call = choices.call
        watch = self.metrics.watch(model.name)
        with model.admission.admitted(len(call.requests)):
            watch.prompt(call.prompt_tokens, looked_up=sum(len(each.prompt_ids) for each in call.requests))
            try:
                async with aclosing(model.backend.stream(call.requests, interval)) as lots:
                    async for events in lots:
                        for index, item in events:
                            if isinstance(item, Completion):
                                watch.completed(item, speculative=call.requests[index].speculative)
                        for piece in choices.take(events):
                            if piece.token_ids:
                                watch.tokens(piece.choice.index, len(piece.token_ids))
                            yield piece
            except (GeneratorExit, asyncio.CancelledError):
                watch.cancelled()
                raise


def unknown_model(name: str | None, known: Iterable[str]) -> UnknownModelError:
    """For whoever asks for a model that is none of these."""
    return UnknownModelError(f"model must be one of {', '.join(map(repr, known))}, not {name!r}")


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {_ENCODER.encode(chunk)}\n\n"
