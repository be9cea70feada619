"""What processes leave behind, as Linux's /proc tells it; and steps of a request under faults."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from outrider import LLM, SamplingParams
from outrider.speculation.request import Completion, Request
from outrider.speculation.statistics import SpeculationStatistics

SECONDS = 30.0
"""Far more than anything here takes, also on a busy machine."""
INTERRUPTED = (130, -signal.SIGINT)
"""Exit codes of a program that Ctrl-C ended, alike to a shell: CPython makes the second of the first if the
signal came while an ``exec`` of a text ran, as named tuples need it at their import."""
PAUSE = 0.004
"""Between two steps: a draft worker on a busy core has to get its turn to be of use."""


def until(condition: Callable[[], object], seconds: float = SECONDS, *, pause: float = 0.02) -> bool:
    """Whether it comes true in time; ``pause`` seconds lie between two looks."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def runs(pid: int) -> bool:
    """Whether there is such a process, and not only its exit code."""
    return _status(pid)[0] not in ("", "Z", "X")


def children(pid: int) -> list[int]:
    """Those of a process that still run."""
    pids = [int(each.name) for each in Path("/proc").iterdir() if each.name.isdecimal()]
    return [each for each in pids if _status(each)[1] == pid and runs(each)]


def _status(pid: int) -> tuple[str, int]:
    """State letter and parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[1])


def open_files() -> int:
    """Descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def complete(
    llm: LLM, prompts: Sequence[str], params: SamplingParams, *, speculative: bool = True
) -> list[Completion]:
    """All choices of all prompts, with a little time between two steps."""
    requests = [
        each for prompt in prompts for each in llm.prepare(prompt, params, speculative=speculative)[1]
    ]

    def pause(*_: object) -> None:
        if speculative:
            time.sleep(PAUSE)

    return list(llm.complete_all(requests, pause))


def accepted(completions: Sequence[Completion]) -> SpeculationStatistics:
    """Their counts, added up."""
    total = SpeculationStatistics()
    for each in completions:
        total.merge(each.stats)
    return total


@dataclass
class Trace:
    """One request, step by step.

    stalls: seconds of each step beside the target's forward, and beside those for which others had the core.
    """

    token_ids: list[int] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)
    stats: SpeculationStatistics = field(default_factory=SpeculationStatistics)


def traced(llm: LLM, request: Request, before_step: Callable[[int, Trace], None] | None = None) -> Trace:
    """Runs a request; ``before_step`` sees the number of the step and what there is so far."""
    trace = Trace()
    with llm.engine.start(request) as run:
        trace.stats = run.stats
        step = 0
        while not run.finished:
            time.sleep(PAUSE)
            if before_step is not None:
                before_step(step, trace)
            began, forwards, kept_off = time.perf_counter(), run.stats.target_seconds, _seconds_kept_off()
            trace.token_ids += run.step().token_ids
            elapsed = time.perf_counter() - began - (_seconds_kept_off() - kept_off)
            trace.stalls.append(elapsed - (run.stats.target_seconds - forwards))
            step += 1
    return trace


def _seconds_kept_off() -> float:
    """For how long this thread could have run and had no core."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
