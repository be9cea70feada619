"""Ctrl-C during a block that must not be left half done."""

import os
import signal
import sys
import threading
from types import SimpleNamespace

import pytest

from outrider.cluster.cli import main
from outrider.cluster.interruption import uninterrupted


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def interrupted(times: int, done: list[bool]) -> None:
    with uninterrupted():
        for _ in range(times):
            interrupt()
        done.append(True)


@pytest.mark.parametrize("times", [1, 2])
def test_it_waits_for_the_end(times: int) -> None:
    done: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted(times, done)
    assert done
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_it_waits_for_torch_to_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SimpleNamespace(_initializing=True)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__spec__=spec))
    main._interrupt(signal.SIGINT, None)
    spec._initializing = False
    with pytest.raises(KeyboardInterrupt):
        threading.Event().wait(30)
    with pytest.raises(KeyboardInterrupt):
        main._interrupt(signal.SIGINT, None)


def test_the_third_one_goes_through() -> None:
    done: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted(3, done)
    assert not done


def test_without_one_nothing_happens() -> None:
    before = signal.getsignal(signal.SIGINT)
    with uninterrupted():
        pass
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_leaves_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
