"""What starts ends: with its owner, with Ctrl-C, and however else; nothing is left behind."""

import gc
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from instruments.processes import INTERRUPTED, accepted, children, complete, open_files, runs, until

from outrider import LLM, SamplingParams
from outrider.cluster import child, launcher
from outrider.cluster.launcher import LocalWorkers

COMMAND = [sys.executable, "-m", "outrider.cluster.cli.main", "generate", "--workers", "local"]
LONG = [f"--prompt={number}" for number in range(300)]
PARAMS = SamplingParams(temperature=0, max_tokens=20)
CONFIG = {"workers": "local:2", "pipeline": "serial", "tree": {"adaptive": False}}
START_SECONDS = 90.0
"""More than a process takes to import everything while others want the cores, too."""
BY_FILE = {"model": str(Path(launcher.__file__).parents[1] / "models/demo/draft")}


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Gives SIGINT its meaning here: in the background of a script it is ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def owned_threads() -> list[threading.Thread]:
    """Threads of this process that are ours; gRPC keeps one of its own."""
    ours = ("outrider", "_read_complaints")
    return [each for each in threading.enumerate() if any(name in repr(each) for name in ours)]


def test_closing_leaves_nothing_and_decodes_plainly() -> None:
    before = children(os.getpid())
    files, threads = open_files(), owned_threads()
    with LLM(speculative_config={**CONFIG, **BY_FILE}) as llm:
        assert llm.workers is not None
        assert llm.workers.local is not None
        pids, addresses = llm.workers.local.pids, llm.workers.local.addresses
        drafted = complete(llm, ["import os\n"] * 3, PARAMS)
        assert accepted(drafted).num_accepted_tokens > 0
        unfinished = llm.stream("import os\n", PARAMS)
        begun = next(unfinished).token_ids
    llm.close()
    # Both sides counted the same work.
    sides = llm.workers.local.statistics
    assert len(sides) == 2
    assert sum(side["sessions_opened"] for side in sides) == 4
    assert sum(side["growth_nodes"] for side in sides) >= accepted(drafted).growth_nodes > 0
    assert all(side["began_at"] < side["ended_at"] for side in sides)
    assert not any(runs(pid) for pid in pids)
    assert children(os.getpid()) == before
    assert not any(_listens(address) for address in addresses)
    assert owned_threads() == threads
    # What had begun goes on, and so does the engine.
    for step in unfinished:
        begun += step.token_ids
    began = time.perf_counter()
    (after,) = complete(llm, ["import os\n"], PARAMS)
    assert after.token_ids == begun == drafted[0].token_ids
    assert (after.stats.generations, after.stats.wait_seconds) == (0, 0.0)
    assert time.perf_counter() - began < 5
    del llm, unfinished
    gc.collect()
    # gRPC's own, for the whole process.
    assert open_files() <= files + 8


def _listens(address: str) -> bool:
    port = int(address.rpartition(":")[2])
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(int(line.split()[1].split(":")[1], 16) == port and line.split()[3] == "0A" for line in lines)


def test_two_targets_with_workers_of_their_own_and_an_exit_without_close(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(
        "from outrider import LLM, SamplingParams\n"
        f"config = {{'workers': 'local', **{BY_FILE!r}}}\n"
        "one, other = (LLM(speculative_config=config, max_model_len=256) for _ in range(2))\n"
        "params = SamplingParams(max_tokens=8, temperature=0)\n"
        "texts = [llm.generate('import os', params)[0].outputs[0].text for llm in (one, other)]\n"
        "assert texts[0] == texts[1]\n"
        "print(*one.workers.local.pids, *other.workers.local.pids)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    pids = [int(each) for each in done.stdout.split()]
    assert len(set(pids)) == 2
    assert not any(runs(pid) for pid in pids)


@contextmanager
def generating(*words: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A run on a terminal, and the terminal's other end."""
    main_end, terminal = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "--threads", "1", *words],
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # Started in the background of a script, the tests themselves may ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        os.close(terminal)
        try:
            yield process, main_end
        finally:
            process.kill()
            os.close(main_end)


def has_worker(process: subprocess.Popen[bytes]) -> bool:
    return bool(children(process.pid))


def has_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def workers_at(moment: str, process: subprocess.Popen[bytes], screen: int) -> list[int]:
    """Waits for a moment of a run; the workers that it has by then."""
    # Before it runs any of our code, Python itself answers the signal.
    assert until(lambda: has_torch(process.pid), START_SECONDS)
    if moment == "start-up":
        return []
    # Without a pause, a new process is seen while it is still being started.
    assert until(lambda: has_worker(process), START_SECONDS, pause=0.0 if moment == "forked" else 0.02)
    workers = children(process.pid)
    if moment == "forked":
        return workers
    assert until(lambda: has_torch(workers[0]), START_SECONDS)
    if moment == "mid-stream":
        await_output(process, screen)
    return workers


def await_output(process: subprocess.Popen[bytes], screen: int) -> None:
    assert process.stderr is not None
    try:
        assert os.read(screen, 1)
    except OSError:  # nobody has the terminal any more
        pytest.fail(f"it ended before it wrote anything: {process.stderr.read().decode()}")


@pytest.mark.parametrize("moment", ["start-up", "forked", "loading", "mid-stream"])
def test_ctrl_c_ends_everything(moment: str) -> None:
    with generating(*LONG) as (process, screen):
        workers = workers_at(moment, process, screen)
        os.killpg(process.pid, signal.SIGINT)
        began = time.monotonic()
        _, error = process.communicate(timeout=60)
        assert process.returncode in INTERRUPTED
        assert error.decode().splitlines()[-1] == "outrider: interrupted"
        assert "Traceback" not in error.decode()
        assert until(lambda: not any(map(runs, workers)), 5)
        assert time.monotonic() - began < 5 + launcher.STOP_SECONDS


@pytest.mark.parametrize("loading", [True, False])
def test_a_killed_owner_leaves_no_worker(loading: bool) -> None:
    with generating(*LONG) as (process, screen):
        assert until(lambda: has_worker(process))
        workers = children(process.pid)
        if not loading:
            assert os.read(screen, 1)
        process.kill()
        process.wait()
        assert until(lambda: not any(map(runs, workers)), 5)


def test_a_second_run_beside_the_first_and_a_worker_that_dies_is_told_once() -> None:
    with generating(*LONG, "--max-tokens", "30") as (first, screen):
        assert os.read(screen, 1)
        words = [*COMMAND, "--threads", "1", "--prompt", "import os", "--max-tokens", "5"]
        # The first waits soon, for nobody reads its terminal; stopped, it would lose its connection, too.
        second = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert (second.returncode, second.stderr) == (0, "")
        assert second.stdout
        (worker,) = children(first.pid)
        os.kill(worker, signal.SIGKILL)
        told: list[bytes] = []
        assert first.stderr is not None
        reader = threading.Thread(target=_drain, args=(screen,), daemon=True)
        reader.start()
        figures = 0
        for line in first.stderr:
            told += [line] if b"warning" in line else []
            figures += line.startswith(b"== prompt") and bool(told)
            if figures == 2:
                break
        first.kill()
        reader.join()
    assert len(told) == 1
    assert told[0].startswith(b"outrider: warning: the draft worker at 127.0.0.1:")
    assert told[0].endswith(b" was killed by signal 9\n")


def _drain(screen: int) -> None:
    try:
        while os.read(screen, 4096):
            pass
    except OSError:  # the other end is closed
        return


def interrupted_wait() -> None:
    raise KeyboardInterrupt


class InterruptedPopen(subprocess.Popen[str]):
    """Ctrl-C comes as soon as there is a process."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    "interruption", [(child.select, "poll", interrupted_wait), (subprocess, "Popen", InterruptedPopen)]
)
def test_an_interrupted_start_leaves_nothing(
    interruption: tuple[Any, str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, threads = children(os.getpid()), set(threading.enumerate())
    monkeypatch.setattr(*interruption)
    with pytest.raises(KeyboardInterrupt):
        LocalWorkers(1, [])
    assert children(os.getpid()) == before
    assert set(threading.enumerate()) <= threads


def test_after_a_restart_that_failed_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError("no more processes")

    before, threads = children(os.getpid()), set(threading.enumerate())
    workers = LocalWorkers(1, [])
    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(BlockingIOError, match="no more processes"):
        workers.restart(0)
    workers.close()
    assert children(os.getpid()) == before
    assert set(threading.enumerate()) <= threads
