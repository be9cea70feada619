"""Two draft workers in processes of their own, started once: starting takes seconds."""

import os
import signal
from collections.abc import Iterator

import pytest

from outrider.cluster.cluster_security import TOKEN_VARIABLE
from outrider.cluster.launcher import LocalWorkers
from outrider.models.demo import pair


@pytest.fixture(scope="session")
def _two_workers() -> Iterator[LocalWorkers]:
    workers = LocalWorkers(2, ["--draft", str(pair.DRAFT)])
    yield workers
    workers.close()


@pytest.fixture
def workers(_two_workers: LocalWorkers, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalWorkers]:
    """Both run, and the environment holds their token. They run again after whatever was done to them."""
    token = _two_workers.security.token
    assert token is not None
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    yield _two_workers
    for index, (pid, address) in enumerate(zip(_two_workers.pids, _two_workers.addresses, strict=True)):
        if address in _two_workers.ends:
            _two_workers.restart(index)
        else:
            os.kill(pid, signal.SIGCONT)
