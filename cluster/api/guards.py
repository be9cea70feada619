"""What every request passes: the key, the limit on its body, and the access log. Plain ASGI."""

import base64
import binascii
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, TypeAlias

log = logging.getLogger("outrider.access")

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health"})
"""That ask for no key."""
QUIET_PATHS = frozenset({"/health", "/metrics", "/status"})
"""That are asked for all the time: the log tells only of errors there."""


def error_body(
    message: str, kind: str, param: str | None = None, code: str | int | None = None
) -> dict[str, Any]:
    """OpenAI's form of an error."""
    # What a client sent may be quoted, and need not be encodable.
    readable = message.encode("utf-8", "replace").decode()
    return {"error": {"message": readable, "type": kind, "param": param, "code": code}}


class KeyGuard:
    """Asks for one of these keys: as a bearer token, or as the password that a browser asks its user for."""

    def __init__(self, app: App, keys: Sequence[str]) -> None:
        self._app, self._keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("path") in OPEN_PATHS or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        body = error_body("a valid API key is missing", "authentication_error", code="invalid_api_key")
        await _answer(send, 401, body, [(b"www-authenticate", b'Basic realm="outrider", charset="UTF-8"')])

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        # Every key is compared with every one given, whatever came of the last comparison.
        found = [hmac.compare_digest(_key(each), key) for each in given for key in self._keys]
        return any(found)


class BodyLimit:
    """Refuses bodies of more than ``limit`` bytes, and stops to read one that turns out to be longer."""

    def __init__(self, app: App, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not announced.isdigit() or int(announced) > self._limit:
            await self._refuse(send)
            return
        received, refused, answering = 0, False, False

        async def counted() -> Message:
            nonlocal received, refused
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit and not answering:
                refused = True
                return {"type": "http.disconnect"}
            return message

        async def unless_refused(message: Message) -> None:
            nonlocal answering
            answering = True
            if not refused:
                await send(message)

        try:
            await self._app(scope, counted, unless_refused)
        except Exception:
            if not refused:
                raise
        if refused:
            await self._refuse(send)

    async def _refuse(self, send: Send) -> None:
        message = f"the body must have at most {self._limit} bytes"
        await _answer(send, 413, error_body(message, "invalid_request_error"), [(b"connection", b"close")])


class AccessLog:
    """One line for each request: where from, what, status, seconds. No prompts and no keys.

    Of ``QUIET_PATHS`` it tells at the level of debugging, unless they fail.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 499

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            client = scope.get("client")
            level = logging.DEBUG if scope["path"] in QUIET_PATHS and status < 400 else logging.INFO
            log.log(
                level,
                "%s %s %s %d %.3fs",
                client[0] if client else "-",
                scope["method"],
                # The path alone: keys have been seen in query strings. Repr: it may hold line ends.
                repr(scope["path"])[1:-1],
                status,
                time.monotonic() - began,
            )


def _key(authorization: bytes) -> bytes:
    """The secret of an ``Authorization`` header; empty where there is none, which is no key."""
    scheme, _, rest = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(rest, validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


async def _answer(send: Send, status: int, body: dict[str, Any], headers: list[tuple[bytes, bytes]]) -> None:
    content = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
