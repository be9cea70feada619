"""The ``workers`` of a speculative config: who drafts in processes of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from outrider.cluster.nearest import refuse_unknown
from outrider.speculation.errors import InvalidConfigError

MAX_PER_REQUEST = 8
"""Every further one is less likely to know what none of the others does, and costs as much."""
MAX_LOCAL_WORKERS = 64
"""More are a mistake, such as a port in place of the number: each has a model in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersConfig:
    """Draft workers, either started on this machine or reached by address.

    count: of local workers. threads, max_sessions: of each local worker.
    addresses: host:port of running ones; none are started then.
    required: whether one of them must be in reach at the start; if not, there may be none yet.
    per_request: how many of the workers draft for a request at once.
    tls_ca, tls_certificate, tls_key: PEM files for reaching them; TLS is off without any.
    """

    count: int = 1
    threads: int = 1
    max_sessions: int = 16
    addresses: tuple[str, ...] = ()
    required: bool = True
    per_request: int = 1
    tls_ca: str | None = None
    tls_certificate: str | None = None
    tls_key: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether workers are to be started on this machine."""
        return not self.addresses and self.required

    @property
    def _known_workers(self) -> int | None:
        """How many there are; None if more may come."""
        if not self.required:
            return None
        return self.count if self.is_local else len(self.addresses)

    @classmethod
    def parse(cls, value: Any) -> "WorkersConfig":
        """``"local"``, ``"local:2"``, ``"host:port,host:port"``, a list of these, or a mapping.

        Raises:
            InvalidConfigError: it is none of them.
        """
        if isinstance(value, str):
            return cls._parse_text(value)
        if isinstance(value, Mapping):
            refuse_unknown("speculative_config.workers", value, (each.name for each in fields(cls)))
            given = dict(value)
            if "addresses" in given:
                given["addresses"] = _addresses(given["addresses"], given.get("required", True))
            return cls(**given)._checked()
        if isinstance(value, Sequence):
            return cls(addresses=_addresses(value))
        raise InvalidConfigError(f"speculative_config: workers must be 'local' or addresses, not {value!r}")

    @classmethod
    def _parse_text(cls, text: str) -> "WorkersConfig":
        kind, colon, number = text.partition(":")
        if kind != "local":
            return cls(addresses=_addresses(text.split(",")))
        if colon and not number.isdecimal():
            raise InvalidConfigError(f"speculative_config: workers must be local:N, not {text!r}")
        return cls(count=int(number) if colon else 1)._checked()

    def _checked(self) -> "WorkersConfig":
        for name in ("count", "threads", "max_sessions", "per_request"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidConfigError(
                    f"speculative_config.workers: {name} must be a positive integer, not {value!r}"
                )
        if self.count > MAX_LOCAL_WORKERS:
            raise InvalidConfigError(
                f"speculative_config.workers: count must be at most {MAX_LOCAL_WORKERS}, not {self.count}"
            )
        most = min(MAX_PER_REQUEST, self._known_workers or MAX_PER_REQUEST)
        if self.per_request > most:
            raise InvalidConfigError(
                f"speculative_config.workers: per_request must be at most {most}"
                f"{', the number of workers' if most < MAX_PER_REQUEST else ''}, not {self.per_request}"
            )
        if not isinstance(self.required, bool):
            raise InvalidConfigError(
                f"speculative_config.workers: required must be true or false, not {self.required!r}"
            )
        for name in ("tls_ca", "tls_certificate", "tls_key"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InvalidConfigError(f"speculative_config.workers: {name} must be a path, not {value!r}")
            if value is not None and self.is_local:
                raise InvalidConfigError(
                    f"speculative_config.workers: local workers do without TLS, so {name} must go"
                )
        return self


def _addresses(values: Any, required: bool = True) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence) or (required and not values):
        raise InvalidConfigError(f"speculative_config.workers: addresses must be host:port, not {values!r}")
    for value in values:
        host, _, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise InvalidConfigError(
                f"speculative_config: workers must be 'local', 'local:N' or host:port, not {value!r}"
            )
    return tuple(values)
