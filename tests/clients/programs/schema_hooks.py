"""For schemathesis: bodies ask for the model that there is, or nothing beyond its name would be looked at."""

from typing import Any

import schemathesis


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:  # noqa: ARG001
    """Without a name it is the only model."""
    if isinstance(body, dict):
        body.pop("model", None)
    return body
