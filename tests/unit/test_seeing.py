"""Events of engines in virtual time, as a Chrome trace: what it says is what happened."""

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from instruments.remote import Deployment, Finished, Pace
from instruments.serving import table_engine
from instruments.table_drafts import relative
from instruments.table_lm import TableLM

from outrider.actors.drafting import NgramEngine
from outrider.actors.transport import Received
from outrider.cluster.seeing import events as noted
from outrider.cluster.seeing.chrome import FIRST_WORKER, LATE_SHOWN, LOCAL_DRAFTER, TARGET, ChromeTrace
from outrider.cluster.seeing.drafters import Drafters
from outrider.cluster.seeing.events import Arrived, Event, EventLog, Opened, Sent
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.replication.messages import ROOT_ID, Growth, GrowthLimits, Open
from outrider.speculation.request import Request
from outrider.speculation.sampling_params import SamplingParams

LM = TableLM.random(3, vocab_size=5, order=2)
HALF = relative(LM, 0.6, seed=1)
PARAMS = SamplingParams(temperature=0.0, seed=0, max_tokens=24)
SHAPE = TreeShape(num_speculative_tokens=8, depth=3, adaptive=False)
PIPELINES = pytest.mark.parametrize("pipeline", ["parallel", "serial"])


def traced(num_requests: int = 1, **settings: Any) -> tuple[dict[str, Any], Deployment, list[Finished]]:
    """A run with draft workers, and its trace."""
    events: list[Event] = []
    log: list[EventLog] = []

    def make(clock: Any) -> EventLog:
        log.append(EventLog(events.extend, clock))
        return log[0]

    deployment = Deployment(LM, draft=HALF, shape=SHAPE, trace=make, **settings)
    target = deployment.target
    running = [target.start([1, 2, start], PARAMS) for start in range(num_requests)]
    target.finish(running)
    log[0].flush()
    return ChromeTrace(events, chr).as_dict(), deployment, running


def of(trace: dict[str, Any], *kinds: str) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event.get("cat") in kinds]


@PIPELINES
def test_every_forward_wait_and_draft_step_has_its_time(pipeline: str) -> None:
    trace, deployment, (done,) = traced(pipeline=pipeline)
    stats, target = done.stats, deployment.target
    forwards = of(trace, "forward")
    assert len(forwards) == stats.target_steps
    assert sum(event["dur"] for event in forwards) == pytest.approx(target.lm.seconds * 1e6)
    assert [event["args"]["rows"] for event in forwards] == [
        *(3 + len(tree) for tree in target.lm.trees[:1]),
        *(1 + len(tree) for tree in target.lm.trees[1:]),
    ]
    waits = sum(event["dur"] for event in of(trace, "wait"))
    assert waits == pytest.approx(stats.wait_seconds * 1e6)
    assert (waits > 0) == (pipeline == "serial")
    drafts = [event for event in of(trace, "draft") if event["ts"] + event["dur"] <= forwards[-1]["ts"]]
    assert {event["pid"] for event in drafts} == {FIRST_WORKER}
    assert {round(event["dur"] / event["args"]["steps"]) for event in drafts} == {10_000}
    assert sum(event["args"]["steps"] for event in of(trace, "draft")) >= stats.draft_steps


@PIPELINES
def test_clocks_are_related_so_that_nothing_is_used_before_it_is_made(pipeline: str) -> None:
    trace, _, _ = traced(pipeline=pipeline)
    ends: dict[int, dict[str, Any]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] in "sf":
            ends.setdefault(event["id"], {})[event["ph"]] = event
    kinds = Counter(pair["s"]["cat"] for pair in ends.values())
    assert kinds["commit"] > 5
    assert kinds["growth"] > 5
    for pair in ends.values():
        assert pair["s"]["ts"] <= pair["f"]["ts"]
        workers = {"commit": pair["f"], "growth": pair["s"]}
        assert workers[pair["s"]["cat"]]["pid"] == FIRST_WORKER
        assert {pair["s"]["pid"], pair["f"]["pid"]} == {TARGET, FIRST_WORKER}


@pytest.mark.parametrize("num_requests", [1, 3])
def test_blocks_of_a_drafter_do_not_overlap(num_requests: int) -> None:
    trace, _, running = traced(num_requests, pace=Pace(draft=0.004))
    drafts = sorted(of(trace, "draft"), key=lambda event: event["ts"])
    assert {event["args"]["request"] for event in drafts} == {each.run.request.request_id for each in running}
    for before, after in pairwise(drafts):
        assert before["ts"] + before["dur"] <= after["ts"] + 0.01


@PIPELINES
def test_late_nodes_are_those_that_the_replica_dropped(pipeline: str) -> None:
    trace, _, (done,) = traced(pipeline=pipeline, pace=Pace(draft=0.02, delay=0.008))
    drafts = of(trace, "draft")
    # What arrived after the last step was taken in by nobody.
    end = max(event["ts"] for event in of(trace, "reconcile"))
    taken = [event["args"] for event in drafts if event["args"]["taken_in"] <= end + 1000]
    late = sum(args.get("late_nodes", 0) for args in taken)
    assert late == done.stats.stale_nodes
    assert late > 0 or pipeline == "serial"
    assert all(len(args["late"]["ids"]) <= LATE_SHOWN for args in taken if "late" in args)


def test_clocks_are_related_by_the_message_that_was_taken_in_soonest() -> None:
    drafters = Drafters()
    opening = Open(
        session=1,
        generation=1,
        token_ids=np.array([1, 2]),
        prompt_length=2,
        params=PARAMS,
        choice=0,
        limits=GrowthLimits(width=1, children=1, steps=1, min_score=0.0),
    )
    drafters.feed([Opened(1, "r"), Sent(5.0, "a", opening)])
    # On the worker's clock, and when it was taken in; the second one waited least.
    for sent_at, arrived in ((100.0, 5.3), (100.2, 5.25), (100.3, 5.5)):
        growth = Growth(
            session=1,
            generation=1,
            seen_commit=0,
            base_length=2,
            first_id=1 + len(drafters.grown),
            parents=np.array([ROOT_ID]),
            tokens=np.array([3]),
            scores=np.ones(1, np.float32),
            draft_steps=1,
            draft_seconds=0.04,
            sent_at=sent_at,
        )
        drafters.feed([Arrived(arrived, "a", [Received(growth, 1)])])
    drafters.settle()
    assert [each.ended for each in drafters.grown] == pytest.approx([5.05, 5.25, 5.35])
    assert [each.began for each in drafters.grown] == pytest.approx([5.01, 5.21, 5.31])


def test_two_workers_have_lanes_of_their_own() -> None:
    trace, _, _ = traced(4, num_workers=2, max_sessions=2)
    names = {
        event["pid"]: event["args"]["name"]
        for event in trace["traceEvents"]
        if event["name"] == "process_name"
    }
    assert names[FIRST_WORKER] == "draft worker draft-0 at draft-0"
    assert names[FIRST_WORKER + 1] == "draft worker draft-1 at draft-1"
    assert {event["pid"] for event in of(trace, "draft")} == {FIRST_WORKER, FIRST_WORKER + 1}


def test_drafting_in_the_target_s_process_is_a_lane_too() -> None:
    events: list[Event] = []
    log = EventLog(events.extend)
    ngrams = NgramEngine(prompt_lookup_min=1, prompt_lookup_max=2, num_speculative_tokens=4)
    engine = table_engine(TableLM.cycle([1, 2, 0]), ngrams)
    engine.trace = log
    run = engine.start(Request(prompt_ids=np.array([1, 2, 0, 1, 2]), params=PARAMS))
    while not run.finished:
        run.step()
    log.flush()
    trace = ChromeTrace(events, chr).as_dict()
    drafts = of(trace, "draft")
    assert len(drafts) == run.stats.draft_steps > 0
    assert {event["pid"] for event in drafts} == {LOCAL_DRAFTER}
    for draft in drafts:
        inside = [step for step in of(trace, "step") if step["ts"] <= draft["ts"] <= step["ts"] + step["dur"]]
        assert len(inside) == 1


def test_the_format_is_what_viewers_expect() -> None:
    trace, _, _ = traced()
    assert json.loads(json.dumps(trace, allow_nan=False)) == trace
    for event in trace["traceEvents"]:
        assert {"ph", "name", "pid", "tid"} <= set(event)
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
        if event["ph"] == "f":
            assert event["bp"] == "e"
    for pid in (TARGET, FIRST_WORKER):
        slices = [each for each in trace["traceEvents"] if each["ph"] == "X" and each["pid"] == pid]
        require_nested(sorted(slices, key=lambda each: (each["ts"], -each["dur"])))


def require_nested(slices: list[dict[str, Any]]) -> None:
    """Slices of one thread hold each other or do not touch; viewers draw nonsense otherwise."""
    open_ends: list[float] = []
    for each in slices:
        while open_ends and open_ends[-1] <= each["ts"] + 0.01:
            open_ends.pop()
        assert not open_ends or each["ts"] + each["dur"] <= open_ends[-1] + 0.01
        open_ends.append(each["ts"] + each["dur"])


def test_a_log_hands_its_events_over_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noted, "CHUNK", 2)
    chunks: list[int] = []
    log = EventLog(lambda events: chunks.append(len(events)))
    for at in range(5):
        log.took_growth((at, at + 1.0))
    assert chunks == [2, 2]
    log.flush()
    assert chunks == [2, 2, 1]
