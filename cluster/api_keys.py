"""Where a server's API keys come from."""

import os
from collections.abc import Iterable

from outrider.cluster.given_files import read_text
from outrider.speculation.errors import InvalidConfigError

KEY_VARIABLE = "OUTRIDER_API_KEY"


def api_keys(given: Iterable[str], file: str | None) -> list[str]:
    """Those given, those in a file, one a line, and that of the environment.

    Raises:
        InvalidConfigError: one is empty, not ASCII or has spaces around it, or the file cannot be read.
    """
    keys = list(given)
    if file is not None:
        lines = read_text(file, "API key file").splitlines()
        keys += [line.strip() for line in lines if line.strip()]
        if not keys:
            raise InvalidConfigError(f"the API key file {file!r} is empty")
    if (of_environment := os.environ.get(KEY_VARIABLE)) is not None:
        keys.append(of_environment)
    for key in keys:
        if not key.strip() or key != key.strip() or not key.isascii():
            raise InvalidConfigError("api_key must be ASCII, not empty, and without spaces around it")
    return keys
