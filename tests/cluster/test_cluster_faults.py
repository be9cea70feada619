"""Draft workers that die, hang, crawl, come back or lie: the tokens stay, and nobody waits for them."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from instruments.hostile_process import LyingWorker, serving_worker
from instruments.processes import Trace, traced, until

from outrider import LLM, SamplingParams
from outrider.actors import draft_process
from outrider.actors.draft_worker import DraftWorker
from outrider.cluster.launcher import LocalWorkers
from outrider.speculation.request import Request

PROMPT = "class Node:\n    def __init__(self"
PARAMS = SamplingParams(temperature=0.7, seed=5, max_tokens=60, ignore_eos=True)
MAX_STALL = 0.25
"""Seconds by which drafters may lengthen a step."""
MAX_PAUSE = 1.0


@pytest.fixture(scope="module")
def plain() -> Trace:
    with LLM(speculative_config={}) as llm:
        return traced(llm, request(llm, speculative=False))


@pytest.fixture(params=["parallel", "serial"])
def llm(workers: LocalWorkers, request: pytest.FixtureRequest) -> Iterator[LLM]:
    """Drafted for by the first of the two workers."""
    config = {"workers": workers.addresses[0], "pipeline": request.param, "tree": {"adaptive": False}}
    with LLM(speculative_config=config) as made:
        yield made
        assert made.workers is not None
        made.workers.pool.poll()  # sessions that are over are let go of
        assert made.workers.pool.num_sessions == 0
        made.engine.target.runner.cache.check_idle()


def request(llm: LLM, *, speculative: bool = True) -> Request:
    (made,) = llm.prepare(PROMPT, PARAMS, speculative=speculative)[1]
    return made


def assert_unharmed(trace: Trace, plain: Trace) -> None:
    """The same tokens, and no step held back for longer than drafters may."""
    assert trace.token_ids == plain.token_ids
    # A busy machine pauses by itself now and then, also in the middle of a wait: it may lengthen one step.
    # That no wait is longer is asserted of every step on the virtual clock.
    *others, longest = sorted(trace.stalls)
    assert max(others) < MAX_STALL
    assert longest < MAX_STALL + MAX_PAUSE


def assert_recovers(llm: LLM, plain: Trace) -> None:
    """A later request is drafted for again."""

    def is_drafted_for() -> bool:
        trace = traced(llm, request(llm))
        assert_unharmed(trace, plain)
        return trace.stats.num_accepted_tokens > 0

    assert until(is_drafted_for)


def test_a_worker_killed_before_it_sent_anything(workers: LocalWorkers, llm: LLM, plain: Trace) -> None:
    os.kill(workers.pids[0], signal.SIGSTOP)

    def kill(step: int, _: Trace) -> None:
        if step == 2:
            os.kill(workers.pids[0], signal.SIGKILL)

    trace = traced(llm, request(llm), kill)
    assert_unharmed(trace, plain)
    assert (trace.stats.growth_messages, trace.stats.generations) == (0, 1)


def test_a_worker_killed_in_mid_stream_and_restarted(workers: LocalWorkers, llm: LLM, plain: Trace) -> None:
    killed_at = []

    def kill(step: int, trace: Trace) -> None:
        if not killed_at and trace.stats.growth_nodes and step > 5:
            os.kill(workers.pids[0], signal.SIGKILL)
            killed_at.append(step)

    trace = traced(llm, request(llm), kill)
    assert_unharmed(trace, plain)
    assert killed_at
    assert llm.workers is not None
    failures = llm.workers.failures
    assert until(failures)
    assert list(failures()) == [workers.addresses[0]]
    workers.restart(0)
    assert_recovers(llm, plain)
    assert failures() == {}


def test_a_worker_that_is_stopped_and_continued(workers: LocalWorkers, llm: LLM, plain: Trace) -> None:
    def stop(step: int, _: Trace) -> None:
        if step == 4:
            os.kill(workers.pids[0], signal.SIGSTOP)

    assert_unharmed(traced(llm, request(llm), stop), plain)
    os.kill(workers.pids[0], signal.SIGCONT)
    assert_recovers(llm, plain)


def test_a_worker_that_crawls(workers: LocalWorkers, llm: LLM, plain: Trace) -> None:
    def slow_down(step: int, _: Trace) -> None:
        os.kill(workers.pids[0], signal.SIGSTOP if step % 4 else signal.SIGCONT)

    assert_unharmed(traced(llm, request(llm), slow_down), plain)
    os.kill(workers.pids[0], signal.SIGCONT)
    assert_recovers(llm, plain)


def test_the_other_worker_takes_over(workers: LocalWorkers, plain: Trace) -> None:
    config = {"workers": workers.addresses, "pipeline": "serial", "tree": {"adaptive": False}}
    killed = []

    def kill(_: int, trace: Trace) -> None:
        name = next(iter(trace.stats.accepted_by_drafter), None)
        if not killed and name is not None:
            os.kill(workers.pids[int(name.removeprefix("draft-"))], signal.SIGKILL)
            killed.append(name)

    with LLM(speculative_config=config) as llm:
        trace = traced(llm, request(llm), kill)
    assert_unharmed(trace, plain)
    assert trace.stats.drafter_failovers == 1
    assert len(trace.stats.accepted_by_drafter) == 2


@pytest.fixture(scope="module")
def tiny(make_model_folder: Any) -> Path:
    return make_model_folder("llama", seed=1)


def test_a_worker_that_lies(tiny: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
    with serving_worker(tiny, LyingWorker) as (address, worker, _):
        config = {"workers": address, "pipeline": "serial", "tree": {"adaptive": False}}
        with LLM(str(tiny), speculative_config=config) as llm:
            (truth,) = llm.prepare("the quick", params, speculative=False)[1]
            expected = traced(llm, truth)
            deadline = time.monotonic() + 20
            while not (isinstance(worker, LyingWorker) and worker.lies > 20 and worker.connections > 1):
                assert time.monotonic() < deadline, "it told too few lies"
                (asked,) = llm.prepare("the quick", params)[1]
                assert_unharmed(traced(llm, asked), expected)
            llm.engine.target.runner.cache.check_idle()


def test_messages_that_a_worker_drops(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    with serving_worker(tiny, DraftWorker) as (address, worker, _):
        config = {"workers": address, "pipeline": "serial", "tree": {"adaptive": False}}
        with LLM(str(tiny), speculative_config=config) as llm:
            (truth,) = llm.prepare("the quick", params, speculative=False)[1]
            expected = traced(llm, truth)

            def drop(step: int, _: Trace) -> None:
                # No room for a message: commits 4 and 5 are never heard.
                room = 0 if step in (4, 5) else 1 << 16
                monkeypatch.setattr(draft_process, "MAX_WAITING", room)

            (asked,) = llm.prepare("the quick", params)[1]
            trace = traced(llm, asked, drop)
            assert trace.token_ids == expected.token_ids
            assert trace.stats.generations > 1
            assert trace.stats.num_accepted_tokens > 0
            assert until(lambda: worker.num_sessions == 0)
