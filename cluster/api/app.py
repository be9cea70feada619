"""The HTTP API: OpenAI's routes, and a few beside. Nothing here knows what serves the models."""

import asyncio
import importlib.metadata
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from outrider.cluster.api.backend import UnavailableError
from outrider.cluster.api.bodies import MEMORY, BodyAdmission
from outrider.cluster.api.calls import token_ids
from outrider.cluster.api.fields import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
)
from outrider.cluster.api.guards import AccessLog, App, BodyLimit, KeyGuard
from outrider.cluster.api.refusals import Refusal, refusal_of, refusal_of_body
from outrider.cluster.api.replies import model_list
from outrider.cluster.api.service import Service
from outrider.speculation.errors import InvalidRequestError, OutriderError

T = TypeVar("T")

MAX_BODY = 16 << 20
"""Bytes of a request's body by default."""
PAGE = Path(__file__).parent / "page"
PAGE_FILES = {
    "icon.svg": "image/svg+xml",
    "style.css": "text/css",
    **dict.fromkeys(("app.js", "dom.js", "figures.js", "playground.js", "stream.js"), "text/javascript"),
}
"""What the page consists of beside index.html, with types: nothing else of the folder can be asked for."""
PAGE_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""It runs its own scripts and styles alone, and talks to this server alone."""
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def build_app(
    make: Callable[[], Awaitable[Service]], *, keys: Sequence[str] = (), max_body: int = MAX_BODY
) -> App:
    """The application; whoever runs it calls ``make`` once, on its event loop, before the first request."""
    app = FastAPI(
        title="Outrider",
        version=_version(),
        lifespan=_life(make),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={"4XX": {"description": "Refused"}, "5XX": {"description": "Not served"}},
    )
    app.add_exception_handler(RequestValidationError, _refused_body)
    app.add_exception_handler(HTTPException, _refused_path)
    app.add_exception_handler(OutriderError, _refused)
    app.add_exception_handler(Exception, _failed)
    _add_generation(app)
    _add_tokens(app)
    _add_operation(app)
    admitted = BodyAdmission(
        app,
        max_body=max_body,
        memory=max(MEMORY, max_body),
        require_room=lambda: app.state.service.require_room(),
        refuse=lambda error: _answer(app, refusal_of(error), None),
    )
    guarded: App = BodyLimit(admitted, max_body)
    if keys:
        guarded = KeyGuard(guarded, keys)
    return AccessLog(guarded)


def _life(make: Callable[[], Awaitable[Service]]) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        app.state.service, app.state.created = await make(), int(time.time())
        try:
            yield
        finally:
            await app.state.service.close()

    return life


def _add_generation(app: FastAPI) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionBody) -> Response:
        return await _generated(request, body)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        return await _generated(request, body)


async def _generated(request: Request, body: GenerationBody) -> Response:
    service = _service(request)
    request.state.model = body.model
    model = service.model(body.model)
    if not body.stream:
        reply = await _unless_gone(request, service.reply(model, body))
        return Response(status_code=499) if reply is None else JSONResponse(reply)
    events = service.stream(model, body)
    first = await _unless_gone(request, anext(events))
    if first is None:
        return Response(status_code=499)

    async def all_of_them() -> AsyncIterator[str]:
        try:
            yield first
            async for event in events:
                yield event
        finally:
            await events.aclose()

    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(all_of_them(), media_type="text/event-stream", headers=headers)


def _add_tokens(app: FastAPI) -> None:
    @app.post("/tokenize")
    async def tokenize(request: Request, body: TokenizeBody) -> Response:
        request.state.model = body.model
        model = _service(request).model(body.model)
        template = model.settings.chat_template
        ids = await asyncio.to_thread(token_ids, body, model.tokenizer, template)
        strings = [model.tokenizer.token_text(each) for each in ids] if body.return_token_strs else None
        limit = model.backend.card.max_model_len
        return JSONResponse({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": strings})

    @app.post("/detokenize")
    async def detokenize(request: Request, body: DetokenizeBody) -> Response:
        request.state.model = body.model
        model = _service(request).model(body.model)
        size = model.backend.card.vocab_size
        for token in body.tokens:
            if not 0 <= token < size:
                raise InvalidRequestError(f"tokens must be below the vocabulary size {size}, not {token}")
        return JSONResponse({"prompt": model.tokenizer.decode(body.tokens, skip_special_tokens=False)})


def _add_operation(app: FastAPI) -> None:
    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        return JSONResponse(_models(request))

    @app.get("/v1/models/{name:path}")
    async def one_model(request: Request, name: str) -> Response:
        _service(request).model(name)
        (row,) = [row for row in _models(request)["data"] if row["id"] == name]
        return JSONResponse(row)

    @app.get("/health")
    async def health(request: Request) -> Response:
        """200 while every model has a target that serves."""
        missing = [model.name for model in _service(request).models if not model.backend.serving]
        if missing:
            raise UnavailableError(f"no target serves {', '.join(missing)}")
        return Response(status_code=200)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": _version()}

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        service = _service(request)
        for model in service.models:
            service.metrics.set_health(model.name, await model.backend.health())
        return Response(service.metrics.exposition(), media_type=METRICS_TYPE)

    @app.get("/status")
    async def status(request: Request) -> Response:
        """What the page at ``/`` shows."""
        return JSONResponse({"models": [await _status(model) for model in _service(request).models]})

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in PAGE_FILES:
            raise HTTPException(404)
        return FileResponse(PAGE / name, media_type=PAGE_FILES[name], headers=PAGE_HEADERS)


async def _status(model: Any) -> dict[str, Any]:
    health, card = await model.backend.health(), model.backend.card
    return {
        "name": model.name,
        "max_model_len": card.max_model_len,
        "max_num_seqs": card.max_num_seqs,
        "dtype": card.dtype,
        "numerics": card.numerics,
        "drafting": card.drafting,
        "serving": health.serving,
        "running": health.running,
        "waiting": health.waiting,
        "kv_cache_usage": health.kv_cache_usage,
        "draft_workers": health.drafters,
        "members": health.members,
    }


def _models(request: Request) -> dict[str, Any]:
    rows = [
        (name, model.backend.card.max_model_len, model.backend.card.numerics)
        for name, model in _service(request).by_name.items()
    ]
    return model_list(rows, request.app.state.created)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T] | Awaitable[T]) -> T | None:
    """What the work returns; None, and the work is cancelled, if the client goes away before."""
    doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(_goes_away(request))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        return doing.result() if doing.done() else None
    finally:
        for task in (doing, gone):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _goes_away(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _refused(request: Request, error: Exception) -> Response:
    """Our own errors."""
    return _error(request, refusal_of(error))


async def _refused_body(request: Request, error: Exception) -> Response:
    """A body that is no JSON or does not fit its fields."""
    assert isinstance(error, RequestValidationError)
    kind = request.headers.get("content-type", "")
    if "json" not in kind:
        message = f"content-type must be application/json, not {kind!r}"
        return _error(request, Refusal(status=415, message=message))
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        message = f"the body must be JSON: {first['ctx']['error']} at {first['loc'][1]}"
        return _error(request, Refusal(status=400, message=message))
    if isinstance(error.body, Mapping):
        request.state.model = error.body.get("model")
    # Places in a body begin with "body" here.
    return _error(request, refusal_of_body(error.errors(), skip=1))


async def _failed(request: Request, error: Exception) -> Response:  # noqa: ARG001
    """What nobody expected; the server's log has the traceback."""
    reply = _error(request, Refusal(status=500, message="internal error; the server's log tells more"))
    # Whatever runs the application closes the connection after an exception, and the client should know.
    reply.headers["connection"] = "close"
    return reply


async def _refused_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message, cause = str(error.detail), error.__cause__
    if isinstance(cause, UnicodeDecodeError):
        message = f"the body is not UTF-8: byte {cause.object[cause.start]:#04x} at {cause.start}"
    return _error(request, Refusal(status=error.status_code, message=message))


def _error(request: Request, refusal: Refusal) -> Response:
    return _answer(request.app, refusal, getattr(request.state, "model", None))


def _answer(app: FastAPI, refusal: Refusal, model: object) -> Response:
    """model: that was asked for, as far as it is known."""
    service = getattr(app.state, "service", None)
    if service is not None:
        service.metrics.refused(service.offered_name(model), refusal.status)
    headers = {} if refusal.retry_after is None else {"retry-after": str(refusal.retry_after)}
    return JSONResponse(refusal.body, refusal.status, headers)


def _version() -> str:
    return importlib.metadata.version("outrider")
