"""Rows in, rows out: the text for each row of a table, several tables at a time through one engine."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from hashlib import blake2b
from typing import Any

from pydantic import ValidationError

from outrider.cluster.api.backend import Backend, UnavailableError
from outrider.cluster.api.calls import Call
from outrider.cluster.api.fields import ChatBody, CompletionBody, GenerationBody
from outrider.cluster.api.refusals import refusal_of_body
from outrider.cluster.api.service import OfferedModel
from outrider.speculation.errors import InvalidRequestError, OutriderError, TargetGroupError
from outrider.speculation.request import Completion

INTERVAL = 60.0
"""Seconds between two looks at a text that is not finished: nobody wants to see it."""
COLUMNS = (
    "generated_text",
    "generated_tokens",
    "num_generated_tokens",
    "num_input_tokens",
    "finish_reason",
    "mean_acceptance_length",
    "num_spec_steps",
    "num_draft_tokens",
    "num_accepted_draft_tokens",
    "error",
)
"""That a row gets; all but ``error`` are None where there is one."""


class RowGenerator:
    """Used from one event loop. seed: with a row's contents, seeds a row that brings no seed."""

    def __init__(self, backend: Backend, model: OfferedModel, seed: int) -> None:
        self._backend, self._model, self._seed = backend, model, seed

    async def rows(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """``COLUMNS`` for each row, which has ``messages`` or ``prompt``, and may have ``sampling_params``.

        Raises:
            TargetGroupError, UnavailableError: the engine ended.
        """
        return list(await asyncio.gather(*map(self._row, rows)))

    async def _row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        empty = dict.fromkeys(COLUMNS)
        try:
            call = self._call(row)
            done = await self._completion(call)
        except ValidationError as error:
            return {**empty, "error": refusal_of_body([dict(each) for each in error.errors()]).message}
        except (TargetGroupError, UnavailableError):
            raise
        except OutriderError as error:
            return {**empty, "error": str(error)}
        return {
            "generated_text": done.text,
            "generated_tokens": done.token_ids,
            "num_generated_tokens": len(done.token_ids),
            "num_input_tokens": call.prompt_tokens,
            "finish_reason": str(done.finish_reason),
            "mean_acceptance_length": done.stats.mean_acceptance_length,
            "num_spec_steps": done.stats.num_spec_steps,
            "num_draft_tokens": done.stats.num_draft_tokens,
            "num_accepted_draft_tokens": done.stats.num_accepted_tokens,
            "error": None,
        }

    def _call(self, row: Mapping[str, Any]) -> Call:
        """
        Raises:
            ValidationError: a parameter does not fit its field.
            InvalidRequestError: the row cannot be served.
        """
        params = row.get("sampling_params") or {}
        if not isinstance(params, Mapping):
            raise InvalidRequestError(f"sampling_params must be a mapping, not {params!r}")
        kind: type[GenerationBody] = CompletionBody if row.get("messages") is None else ChatBody
        for name in params:
            if name not in kind.model_fields or name in ("prompt", "messages", "stream", "model"):
                raise InvalidRequestError(f"sampling_params has no {name!r} here")
        text = {name: row[name] for name in ("prompt", "messages") if row.get(name) is not None}
        if len(text) != 1:
            raise InvalidRequestError("a row must have either prompt or messages")
        body = kind.model_validate({**params, **text})
        if body.seed is None:
            body = body.model_copy(update={"seed": self._seed_of(row)})
        call = self._model.call(body)
        if len(call.requests) != 1:
            raise InvalidRequestError(f"a row must ask for one text, not {len(call.requests)}")
        return call

    def _seed_of(self, row: Mapping[str, Any]) -> int:
        """The same whenever the row is served: what Ray does again has the same result."""
        contents = json.dumps(row, sort_keys=True, default=str).encode()
        digest = blake2b(contents, key=self._seed.to_bytes(8, "little"), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    async def _completion(self, call: Call) -> Completion:
        async with aclosing(self._backend.stream(call.requests, INTERVAL)) as lots:
            async for events in lots:
                for _, item in events:
                    if isinstance(item, Completion):
                        return item
        raise UnavailableError("the engine has ended")
