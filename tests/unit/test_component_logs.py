"""Log lines: whose they are, and which request they are about."""

import logging
import re
from collections.abc import Iterator

import pytest
from instruments.processes import until

from outrider import LLM, SamplingParams
from outrider.actors.engine_loop import EngineLoop
from outrider.actors.running_batch import RunningBatch
from outrider.cluster.component_logs import log_as
from outrider.speculation.request import StepEvent


@pytest.fixture
def _restored() -> Iterator[None]:
    logger = logging.getLogger("outrider")
    before = logger.handlers, logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate, logger.level = before


@pytest.mark.usefixtures("_restored")
def test_a_line_names_its_component_once(capsys: pytest.CaptureFixture[str]) -> None:
    log_as("draft-0")
    log_as("target-0")
    logging.getLogger("outrider.actors.anything").info("request %s: something", "abc")
    logging.getLogger("another.library").info("not ours")
    line = capsys.readouterr().err
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} target-0 INFO request abc: something\n", line)


def test_a_request_is_followed_by_its_id(make_model_folder, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    caplog.set_level(logging.INFO, "outrider")
    llm = LLM(str(make_model_folder("llama")))
    done: list[StepEvent] = []
    loop = EngineLoop(RunningBatch(llm.engine, 2), lambda error: pytest.fail(str(error)))
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    requests = [llm.prepare("the quick", params)[1][0] for _ in range(2)]
    loop.submit(requests, done.extend)
    assert until(lambda: sum(event.completion is not None for event in done) == 2)
    loop.close()
    first, second = (request.request_id for request in requests)
    assert first != second
    for request_id in (first, second):
        lines = [record.getMessage() for record in caplog.records if request_id in record.getMessage()]
        assert re.fullmatch(rf"request {request_id}: \d+ prompt tokens", lines[0])
        assert lines[-1] == f"request {request_id}: length after 3 tokens in 3 steps, 0 tokens drafted"
