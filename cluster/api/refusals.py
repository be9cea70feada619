"""What is said to whoever asked for what is not served, in OpenAI's form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outrider.cluster.api.admission import OverloadedError
from outrider.cluster.api.backend import UnavailableError
from outrider.cluster.api.fields import UnsupportedFieldError
from outrider.cluster.api.guards import error_body
from outrider.cluster.api.service import UnknownModelError
from outrider.speculation.errors import InvalidRequestError

RETRY_SECONDS = 5
"""That a client is told to wait while nobody serves."""
_KINDS = {404: "not_found_error", 429: "rate_limit_error", 503: "service_unavailable_error"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An answer that is an error. param: the field at fault. retry_after: seconds."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The answer's."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return error_body(self.message, kind, self.param, self.code or self.status)


def refusal_of(error: Exception) -> Refusal:
    """For one of our own errors."""
    message = str(error)
    if isinstance(error, UnknownModelError):
        return Refusal(status=404, message=message, param="model", code="model_not_found")
    if isinstance(error, InvalidRequestError):
        param = error.field if isinstance(error, UnsupportedFieldError) else message.partition(" must ")[0]
        return Refusal(status=400, message=message, param=param if param.isidentifier() else None)
    if isinstance(error, OverloadedError):
        return Refusal(status=429, message=message, retry_after=error.retry_after)
    if isinstance(error, UnavailableError):
        return Refusal(status=503, message=message, retry_after=RETRY_SECONDS)
    return Refusal(status=500, message=message)


def refusal_of_body(errors: Sequence[Mapping[str, Any]], *, skip: int = 0) -> Refusal:
    """For a body that does not fit its fields: the first reason that pydantic gives.

    skip: parts of each place that do not lie in the body.
    """
    first = errors[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UnsupportedFieldError):
        return Refusal(status=400, message=str(cause), param=cause.field, code="unsupported_parameter")
    # Behind a field that may be of several types stand the types that it was tried as.
    place = ".".join(str(part) for part in first["loc"][skip:] if str(part)[:4] not in ("str", "list"))
    message = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    if not place and first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "should be an object"
    return Refusal(status=400, message=f"{place or 'the body'}: {message}", param=place or None)
