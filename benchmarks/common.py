"""What every benchmark shares: the conditions it ran under, and a JSON last line."""

import json
import sys
from importlib.metadata import version
from typing import Any

from outrider.cluster.bench.machine import description


def conditions(**more: Any) -> dict[str, Any]:
    """Machine, versions, threads and command."""
    return {
        "command": "python " + " ".join(sys.argv),
        **description(),
        "transformers": version("transformers"),
        **more,
    }


def finish(result: dict[str, Any]) -> None:
    """The last line of standard output."""
    print(json.dumps(result))
