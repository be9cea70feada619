"""Who may send a body: known before it is read, so that memory does not grow with the connections."""

import asyncio
from collections.abc import Callable

from starlette.responses import Response

from outrider.cluster.api.admission import OverloadedError
from outrider.cluster.api.backend import UnavailableError
from outrider.cluster.api.guards import App, Message, Receive, Scope, Send
from outrider.speculation.errors import OutriderError

MEMORY = 128 << 20
"""Bytes of bodies that may be in memory at once, but that one always may."""
GENERATION_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
RETRY_SECONDS = 1
BODY_SECONDS = 30.0


class BodyAdmission:
    """Lets a body in while there is memory for it, and for generation while there is room in the queue.

    A body counts with the length that it announces, or the greatest one, until it has been read, and then
    with its own until its request has been answered, for so long it may be kept.

    max_body, memory: bytes of one and of all. require_room: raises when no text can be let in.
    refuse: the answer to whoever is not. patience: seconds that a body may take to arrive.
    """

    def __init__(
        self,
        app: App,
        *,
        max_body: int,
        memory: int,
        require_room: Callable[[], None],
        refuse: Callable[[OutriderError], Response],
        patience: float = BODY_SECONDS,
    ) -> None:
        self._app, self._max_body, self._memory = app, max_body, memory
        self._require_room, self._refuse, self._patience = require_room, refuse, patience
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = self._size(scope) if scope["type"] == "http" else 0
        if not size:
            await self._app(scope, receive, send)
            return
        try:
            if scope["path"] in GENERATION_PATHS:
                self._require_room()
            self._require_memory(size)
        except (OverloadedError, UnavailableError) as error:
            await self._refuse(error)(scope, receive, send)
            return
        await self._hold(size, scope, receive, send)

    async def _hold(self, size: int, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the request; ``size``: what its body counts until it is here."""
        held, received, is_here = size, 0, False
        deadline = asyncio.get_running_loop().time() + self._patience

        async def counted() -> Message:
            nonlocal held, received, is_here
            if is_here:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                # To the application its client is gone, and the connection is closed for want of an answer.
                return {"type": "http.disconnect"}
            received += len(message.get("body", b""))
            if not message.get("more_body", False):
                is_here = True
                self._held += received - held
                held = received
            return message

        self._held += held
        try:
            await self._app(scope, counted, send)
        finally:
            self._held -= held

    def _require_memory(self, size: int) -> None:
        if self._held + size > self._memory:
            raise OverloadedError(f"bodies of {self._held} bytes are being served", RETRY_SECONDS)

    def _size(self, scope: Scope) -> int:
        for name, value in scope["headers"]:
            if name == b"transfer-encoding":
                return self._max_body
            if name == b"content-length":
                return int(value)
        return 0
