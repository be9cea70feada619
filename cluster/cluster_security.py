"""Where processes of a cluster find the token and the certificates that they share."""

import os
from pathlib import Path

from outrider.actors.security import Security

TOKEN_VARIABLE = "OUTRIDER_CLUSTER_TOKEN"
"""Environment variable with the token: command lines can be read by every user of a machine."""


def cluster_security(
    ca: str | None = None, certificate: str | None = None, key: str | None = None
) -> Security:
    """The environment's token and these PEM files.

    Raises:
        InvalidConfigError: the token is malformed, or a certificate lacks its key.
    """
    files = {"ca": ca, "certificate": certificate, "key": key}
    paths = {name: None if path is None else Path(path) for name, path in files.items()}
    return Security(token=os.environ.get(TOKEN_VARIABLE) or None, **paths)
