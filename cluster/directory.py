"""The draft workers and targets of a cluster that serve now, and where."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a process runs: the node's address, and the process's id there."""

    node: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftWorkerEntry:
    """A draft worker that listens. address: host:port of its gRPC server."""

    name: str
    epoch: int
    address: str
    model: str
    place: Place


class Directory:
    """Who drafts. An entry of an older epoch neither replaces a newer one nor removes it."""

    def __init__(self) -> None:
        self._entries: dict[str, DraftWorkerEntry] = {}

    @property
    def addresses(self) -> list[str]:
        """Of all draft workers, by name."""
        return [self._entries[name].address for name in sorted(self._entries)]

    def get(self, name: str) -> DraftWorkerEntry | None:
        """The worker of that name, if it serves."""
        return self._entries.get(name)

    def register(self, entry: DraftWorkerEntry) -> bool:
        """Notes a worker; False if a newer epoch of it is known."""
        known = self._entries.get(entry.name)
        if known is not None and known.epoch > entry.epoch:
            return False
        self._entries[entry.name] = entry
        return True

    def remove(self, name: str, epoch: int) -> bool:
        """Forgets a worker; False if that epoch is not the one that is known."""
        known = self._entries.get(name)
        if known is None or known.epoch != epoch:
            return False
        del self._entries[name]
        return True
