"""Opened, hurt and closed again and again: nothing piles up."""

import os
import signal
from collections.abc import Callable

import pytest
from instruments.processes import Trace, children, open_files, traced, until

from outrider import LLM, SamplingParams
from outrider.cluster.launcher import LocalWorkers
from outrider.speculation.request import Request

ROUNDS = 12
PARAMS = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def request(llm: LLM) -> Request:
    return llm.prepare("import os\n", PARAMS)[1][0]


@pytest.mark.parametrize("pipeline", ["parallel"])
def test_rounds_of_open_kill_and_restart(pipeline: str, workers: LocalWorkers) -> None:
    config = {"workers": workers.addresses, "pipeline": pipeline, "tree": {"adaptive": False}}
    tokens, files = [], []
    killed: list[int] = []
    before = len(children(os.getpid()))
    for number in range(ROUNDS):
        with LLM(speculative_config=config) as llm:
            assert llm.workers is not None
            tokens.append(traced(llm, request(llm), _fault(number, llm, workers, killed)).token_ids)
            if killed:
                # It may have been killed in the very last step, and dying takes a moment.
                assert until(lambda: workers.ends)
                workers.restart(killed.pop())
            os.kill(workers.pids[number % 2], signal.SIGCONT)
            assert until(lambda llm=llm: traced(llm, request(llm)).stats.num_accepted_tokens > 0)
            llm.workers.pool.poll()
            assert llm.workers.pool.num_sessions == 0
            llm.engine.target.runner.cache.check_idle()
        files.append(open_files())
        assert len(children(os.getpid())) == before
    assert len({tuple(each) for each in tokens}) == 1
    # The first rounds may open what stays open.
    assert max(files[-4:]) <= max(files[:4])


def _fault(number: int, llm: LLM, workers: LocalWorkers, killed: list[int]) -> Callable[[int, Trace], None]:
    """Every third round kills a worker, the next one stops it, the one after that opens and abandons."""

    def hurt(step: int, _: Trace) -> None:
        if step != 5 + number % 7:
            return
        if number % 3 == 0:
            killed.append(number % 2)
        if number % 3 < 2:
            os.kill(workers.pids[number % 2], (signal.SIGKILL, signal.SIGSTOP)[number % 3])
        else:
            with llm.engine.start(request(llm)) as abandoned:
                abandoned.step()

    return hurt
