"""Who may talk to whom: the cluster's token, and TLS."""

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import grpc

from outrider.speculation.errors import InvalidConfigError

_HEADER = "authorization"


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """How one process proves who it is, and whom it believes.

    token: shared by the cluster, sent with every call. Without TLS the network can read it.
    ca: PEM file of the authorities to believe: a client wants a server's certificate from one
        of them, a server (mutual TLS) each client's.
    certificate, key: PEM files, this process's own chain and private key; a server that has
        them speaks TLS only.

    Raises:
        InvalidConfigError: the token cannot be a header, or a certificate lacks its key.
    """

    token: str | None = field(default=None, repr=False)
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        token = self.token
        # The message does not show it: it is a secret.
        if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
            raise InvalidConfigError("the cluster token must be printable ASCII characters without spaces")
        if self.certificate is not None and self.key is None:
            raise InvalidConfigError(f"the certificate {self.certificate} needs a key file")
        if self.key is not None and self.certificate is None:
            raise InvalidConfigError(f"the key {self.key} needs a certificate file")

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a client sends with every call."""
        return () if self.token is None else ((_HEADER, f"Bearer {self.token}"),)

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """A client's, or None for plaintext.

        Raises:
            InvalidConfigError: a file is missing, unreadable or not PEM.
        """
        if self.ca is None and self.certificate is None:
            return None
        return grpc.ssl_channel_credentials(_pem(self.ca), _pem(self.key), _pem(self.certificate))

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """A server's, or None for plaintext; with ``ca``, clients must show a certificate.

        Raises:
            InvalidConfigError: a file is missing, unreadable or not PEM, or there is a ``ca`` only.
        """
        key, chain, ca = _pem(self.key), _pem(self.certificate), _pem(self.ca)
        if key is None or chain is None:
            if ca is not None:
                raise InvalidConfigError(f"a server with the authority {self.ca} needs a certificate too")
            return None
        return grpc.ssl_server_credentials([(key, chain)], ca, require_client_auth=ca is not None)


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call, to known methods and others, that does not carry the token."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Passes the call on, or ends it with UNAUTHENTICATED."""
        shown = [value for name, value in handler_call_details.invocation_metadata or () if name == _HEADER]
        if len(shown) == 1 and hmac.compare_digest(_bytes(shown[0]), self._expected):
            return await continuation(handler_call_details)
        # A stream handler answers at once, whichever of the four kinds the caller believes in.
        return grpc.stream_stream_rpc_method_handler(_refuse_wrong if shown else _refuse_missing)


async def _refuse_missing(_requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> NoReturn:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the cluster token is missing")


async def _refuse_wrong(_requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> NoReturn:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the cluster token is wrong")


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _pem(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidConfigError(f"cannot read {path}: {error.strerror}") from error
    if b"-----BEGIN " not in content:
        raise InvalidConfigError(f"{path} is not a PEM file")
    return content
