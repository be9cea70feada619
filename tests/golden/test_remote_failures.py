"""Draft workers that vanish, hang, talk nonsense and come back: the same output, and no stall.

``Target.step`` requires of every step that it commits something and is not held back for more
than a quarter of a second.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from instruments.hostile import HostileChannel
from instruments.remote import Deployment, Finished, Pace, Target, TimedTable, plain
from instruments.table_drafts import relative
from instruments.table_lm import TableLM

from outrider.actors.virtual import VirtualClock
from outrider.speculation.pipelines.patience import MAX_PATIENCE, PAUSE
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.replication.messages import Growth, Lost
from outrider.speculation.sampling_params import SamplingParams

PROMPT = [1, 2, 3]
GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=150)
SEEDED = SamplingParams(temperature=1.0, seed=11, max_tokens=150)
BOTH = pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
PIPELINES = pytest.mark.parametrize("pipeline", ["parallel", "serial"])
LM = TableLM.random(3, vocab_size=5, order=2)
GOOD = relative(LM, 0.6, seed=1)


def serve_through(
    deployment: Deployment, params: SamplingParams, at_step: Mapping[int, Callable[[], object]]
) -> Finished:
    """One request; after so many steps something happens."""
    outcome = deployment.target.start(PROMPT, params)

    def between() -> None:
        at_step.get(len(outcome.steps), lambda: None)()

    between()
    deployment.target.finish([outcome], between)
    assert outcome.token_ids == plain(LM, PROMPT, params)
    assert outcome.streamed == outcome.run.text
    return outcome


def second_half(outcome: Finished) -> int:
    """Accepted tokens of the later half of the steps."""
    return sum(step.num_accepted for step in outcome.steps[len(outcome.steps) // 2 :])


@BOTH
@PIPELINES
@pytest.mark.parametrize("seconds", [0.0, 0.0005, 0.013, 0.04, 0.0512, 0.3])
def test_a_worker_that_vanishes_at_any_time_comes_back(
    params: SamplingParams, pipeline: str, seconds: float
) -> None:
    """Before it sent anything, mid-stream, while the target computes, right behind a verification."""
    deployment = Deployment(LM, draft=GOOD, pipeline=pipeline)
    (link,) = deployment.links[0]
    deployment.world.after(seconds, lambda: link.disconnect("killed"))
    deployment.world.after(seconds + 0.6, link.connect)
    outcome = serve_through(deployment, params, {})
    assert outcome.stats.generations == 2
    assert second_half(outcome) > 10
    deployment.require_empty()


@BOTH
@PIPELINES
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_worker_that_vanishes_between_two_steps_comes_back(
    params: SamplingParams, pipeline: str, steps: int
) -> None:
    deployment = Deployment(LM, draft=GOOD, pipeline=pipeline)
    (link,) = deployment.links[0]
    events = {steps: lambda: link.disconnect("killed"), steps + 8: link.connect}
    outcome = serve_through(deployment, params, events)
    away = outcome.steps[steps + 2 : steps + 8]
    assert pipeline == "serial" or any(step.num_accepted == 0 for step in away)
    assert outcome.stats.generations == 2
    assert second_half(outcome) > 10
    deployment.require_empty()


@BOTH
@PIPELINES
def test_a_stream_that_breaks_time_and_again(params: SamplingParams, pipeline: str) -> None:
    deployment = Deployment(LM, draft=GOOD, pipeline=pipeline)
    (link,) = deployment.links[0]
    for number in range(12):
        deployment.world.after(0.1 * number, lambda: link.disconnect("flapping"))
        deployment.world.after(0.1 * number + 0.03, link.connect)
    outcome = serve_through(deployment, params, {})
    assert outcome.stats.generations >= 6
    assert second_half(outcome) > 10
    deployment.require_empty()


@BOTH
@PIPELINES
@pytest.mark.parametrize("hang", [0.3, 1.0, 2.5])
def test_a_worker_that_hangs_and_goes_on(params: SamplingParams, pipeline: str, hang: float) -> None:
    """A short hang ends no generation; after a long one the request is opened anew."""
    deployment = Deployment(LM, draft=GOOD, pipeline=pipeline)
    (worker,) = deployment.workers

    def stop() -> None:
        worker.stopped = True
        deployment.world.after(hang, go_on)

    def go_on() -> None:
        worker.stopped = False
        worker.wake()

    outcome = serve_through(deployment, replace(params, max_tokens=190), {3: stop})
    assert (outcome.stats.generations > 1) == (hang > 2)
    recovered = deployment.pace.target * 3 + hang + 0.5
    assert outcome.times[-1] > recovered + 0.3, "the text is too short to show anything"
    assert outcome.accepted_after(recovered) > 5
    deployment.require_empty()


@PIPELINES
def test_a_worker_that_hangs_for_good(pipeline: str) -> None:
    """The serial pipeline waits for it now and then, for little of its time, and else decodes plainly."""
    deployment = Deployment(LM, draft=GOOD, pipeline=pipeline)
    (worker,) = deployment.workers

    def stop() -> None:
        worker.stopped = True

    outcome = serve_through(deployment, GREEDY, {2: stop})
    lost = sum(deployment.target.stalls[3:])
    assert lost <= (MAX_PATIENCE + outcome.times[-1] / PAUSE if pipeline == "serial" else 0.01)
    assert outcome.stats.generations >= 2
    assert len(worker._inbox) < 200


@BOTH
@PIPELINES
@pytest.mark.parametrize("failure", ["vanishes", "hangs"])
def test_another_worker_takes_over(params: SamplingParams, pipeline: str, failure: str) -> None:
    deployment = Deployment(LM, draft=GOOD, pipeline=pipeline, num_workers=2)
    first, _ = deployment.workers

    def fail() -> None:
        if failure == "vanishes":
            deployment.links[0][0].disconnect("killed")
        else:
            first.stopped = True

    outcome = serve_through(deployment, replace(params, max_tokens=190), {3: fail})
    assert outcome.stats.drafter_failovers == 1
    assert outcome.stats.generations == 2
    assert set(outcome.stats.accepted_by_drafter) == {"draft-0", "draft-1"}
    assert second_half(outcome) > 10


@PIPELINES
def test_workers_that_vanish_one_after_the_other_hold_nothing_back(pipeline: str) -> None:
    """Each failover begins a round of drafting that a serial target would wait for anew."""
    deployment = Deployment(LM, draft=GOOD, pipeline=pipeline, num_workers=6)
    for worker in deployment.workers:
        worker.stopped = True
    for number, link in enumerate(deployment.links[0]):
        deployment.world.after(0.12 * (number + 1), partial(link.disconnect, "killed"))
    outcome = serve_through(deployment, GREEDY, {})
    assert outcome.stats.drafter_failovers >= 3


@BOTH
@PIPELINES
def test_several_requests_survive_their_worker(params: SamplingParams, pipeline: str) -> None:
    fast = Pace(draft=0.003)
    deployment = Deployment(LM, draft=GOOD, pipeline=pipeline, pace=fast, num_workers=2)
    wanted = [replace(params, seed=seed, max_tokens=60 + seed) for seed in range(4)]
    running = [deployment.target.start(PROMPT, each) for each in wanted]
    deployment.world.after(0.4, lambda: deployment.links[0][0].disconnect("killed"))
    deployment.world.after(0.9, deployment.links[0][0].connect)
    deployment.target.finish(running)
    for outcome, each in zip(running, wanted, strict=True):
        assert outcome.token_ids == plain(LM, PROMPT, each)
        assert second_half(outcome) > 4
    assert sum(outcome.stats.drafter_failovers for outcome in running) == 2
    deployment.require_empty()


def growth(**values: object) -> Growth:
    fields: dict[str, object] = {
        "session": 1,
        "generation": 1,
        "seen_commit": 0,
        "base_length": 3,
        "first_id": 1,
        "parents": np.array([0]),
        "tokens": np.array([1]),
        "scores": np.array([1.0], np.float32),
    }
    return Growth(**{**fields, **values})  # type: ignore[arg-type]


GARBAGE: dict[str, Sequence[bytes | Growth | Lost]] = {
    "bytes": [b"\xff\xff", b""],
    "NaN": [growth(scores=np.array([np.nan], np.float32))],
    "huge scores": [growth(scores=np.array([1e30], np.float32))],
    "a node below itself": [growth(parents=np.array([1]))],
    "foreign tokens": [growth(tokens=np.array([5]))],
    "more text than there is": [growth(base_length=1000)],
    "more commits than there were": [growth(seen_commit=9)],
    "a gap": [growth(first_id=5)],
    "lost at once": [Lost(session=1, generation=generation) for generation in range(1, 40)],
    "other sessions": [growth(session=2), growth(generation=7), Lost(session=8, generation=1)],
}


@PIPELINES
@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_costs_nothing_but_speed(pipeline: str, kind: str) -> None:
    world = VirtualClock()
    channel = HostileChannel(world, LM.vocab_size)
    shape = TreeShape()
    target = Target(
        world, TimedTable(LM, world, Pace()), [channel], channel,
        pipeline=pipeline, shape=shape,
    )  # fmt: skip
    for round_number in range(40):
        for each in GARBAGE[kind]:
            world.after(0.05 * round_number, partial(channel.say, each))
    outcome = target.serve(PROMPT, replace(GREEDY, max_tokens=40))
    assert outcome.token_ids == plain(LM, PROMPT, replace(GREEDY, max_tokens=40))
    assert len(outcome.steps) == 40
    assert target.pool.num_sessions <= 1
