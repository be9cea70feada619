"""Several drafters feed one tree: the same output, more of it foreseen, each credited with its own."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from instruments.checks import CYCLE
from instruments.hostile import HostileChannel
from instruments.remote import Deployment, Finished, Pace, Target, TimedTable, hello_for, plain, welcome_of
from instruments.table_drafts import TableDraftEngine, relative
from instruments.table_lm import TableLM

from outrider.actors.draft_worker import DraftWorker
from outrider.actors.virtual import BusyTime, VirtualArrivals, VirtualClock, VirtualLink, VirtualWorker
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.replication.messages import Growth, Lost
from outrider.speculation.sampling_params import SamplingParams

PROMPT = [1, 2, 3]
GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=60)
SEEDED = SamplingParams(temperature=1.0, seed=11, max_tokens=60)
BOTH = pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
PIPELINES = pytest.mark.parametrize("pipeline", ["parallel", "serial"])
LM = TableLM.random(3, vocab_size=8, order=2)
GOOD, BAD = relative(LM, 0.75, seed=1), relative(LM, 0.45, seed=2)
SLOW_DRAFTS = Pace(draft=0.02)
FIXED = TreeShape(adaptive=False, depth=3)
CHAIN = TreeShape(width=1, children=1, min_score=0.0)


def serve(deployment: Deployment, params: SamplingParams) -> Finished:
    outcome = deployment.target.serve(PROMPT, params)
    assert outcome.token_ids == plain(LM, PROMPT, params)
    assert sum(outcome.stats.accepted_by_drafter.values()) == outcome.stats.num_accepted_tokens
    deployment.require_empty()
    return outcome


def total_steps(drafts: list[TableLM]) -> int:
    """Of several texts, all pipelines' default."""
    steps = 0
    for seed in range(4):
        deployment = Deployment(LM, draft=drafts, per_request=len(drafts), pace=SLOW_DRAFTS)
        steps += len(serve(deployment, replace(SEEDED, seed=seed)).steps)
    return steps


def test_two_drafters_foresee_no_less_than_the_better_one() -> None:
    alone = total_steps([GOOD])
    assert alone < total_steps([BAD])
    assert total_steps([GOOD, BAD]) <= alone
    assert total_steps([BAD, GOOD]) <= alone


@BOTH
@PIPELINES
def test_twins_are_one_drafter(params: SamplingParams, pipeline: str) -> None:
    """All that the second one says has been said: the same trees, and nothing to its credit."""
    alone = Deployment(LM, draft=GOOD, pipeline=pipeline, shape=FIXED)
    twins = Deployment(LM, draft=[GOOD, GOOD], per_request=2, pipeline=pipeline, shape=FIXED)
    one, two = serve(alone, params), serve(twins, params)
    assert [step.token_ids for step in one.steps] == [step.token_ids for step in two.steps]
    assert one.stats.accepted_by_drafter == two.stats.accepted_by_drafter
    assert two.stats.growth_nodes == 2 * one.stats.growth_nodes
    assert two.stats.draft_seconds == pytest.approx(2 * one.stats.draft_seconds)


@PIPELINES
def test_accepted_tokens_are_credited_to_who_knew_them(pipeline: str) -> None:
    """Each is right after the tokens after which the other is wrong, and drafts one token for each."""
    lm = TableLM.cycle(CYCLE)
    mask = np.isin(np.arange(lm.vocab_size), CYCLE[: len(CYCLE) // 2])
    wrong = np.roll(lm.logits, 1, axis=-1)
    first = TableLM(np.where(mask[:, None], lm.logits, wrong))
    second = TableLM(np.where(mask[:, None], wrong, lm.logits))
    deployment = Deployment(
        lm, draft=[first, second], per_request=2, pipeline=pipeline, shape=CHAIN, pace=SLOW_DRAFTS
    )
    outcome = deployment.target.serve(PROMPT, GREEDY)
    last, known = PROMPT[-1], {"draft-0": 0, "draft-1": 0}
    for step in outcome.steps:
        for index, token in enumerate(step.token_ids):
            if index < step.num_accepted:
                known["draft-0" if mask[last] else "draft-1"] += 1
            last = token
    assert min(known.values()) > 3
    assert outcome.stats.accepted_by_drafter == known


@BOTH
@PIPELINES
def test_one_that_is_killed_costs_only_its_growth(params: SamplingParams, pipeline: str) -> None:
    """The request is never without a drafter, and the one that comes back feeds it again."""
    params = replace(params, max_tokens=150)
    deployment = Deployment(LM, draft=[BAD, GOOD], per_request=2, pipeline=pipeline)
    link = deployment.links[0][0]
    deployment.world.after(0.17, lambda: link.disconnect("killed"))
    deployment.world.after(0.6, link.connect)
    outcome = serve(deployment, params)
    assert (outcome.stats.generations, outcome.stats.drafter_failovers) == (3, 0)
    assert "no_drafter" not in outcome.stats.steps_by_choice
    assert sum(step.num_accepted for step in outcome.steps) > 60


@PIPELINES
def test_one_that_hangs_is_not_waited_for_while_the_other_answers(pipeline: str) -> None:
    params = replace(GREEDY, max_tokens=150)
    alone = serve(Deployment(LM, draft=GOOD, pipeline=pipeline), params)
    deployment = Deployment(LM, draft=[BAD, GOOD], per_request=2, pipeline=pipeline)

    def stop() -> None:
        deployment.workers[0].stopped = True

    deployment.world.after(0.3, stop)
    outcome = deployment.target.serve(PROMPT, params)
    assert outcome.token_ids == plain(LM, PROMPT, params)
    assert outcome.times[-1] < 1.1 * alone.times[-1]


def test_a_third_worker_takes_the_place_of_one_that_is_gone() -> None:
    deployment = Deployment(LM, draft=[GOOD, BAD, GOOD], per_request=2)
    deployment.world.after(0.17, lambda: deployment.links[0][1].disconnect("killed"))
    outcome = serve(deployment, GREEDY)
    assert (outcome.stats.generations, outcome.stats.drafter_failovers) == (3, 1)
    assert outcome.stats.accepted_by_drafter["draft-0"] > 0


def nonsense(generation: int, round_number: int) -> list[bytes | Growth | Lost]:
    """What ends the stream, what ends the generation, and what is believed."""

    def growth(**values: object) -> Growth:
        fields: dict[str, object] = {
            "session": 1, "generation": generation, "seen_commit": 0, "base_length": 3, "first_id": 1,
            "parents": np.zeros(3, np.int64), "tokens": np.arange(3), "scores": np.ones(3, np.float32),
        }  # fmt: skip
        return Growth(**{**fields, **values})  # type: ignore[arg-type]

    kinds: list[list[bytes | Growth | Lost]] = [
        [growth(), growth(first_id=4, parents=np.array([1, 2, 3]))],
        [growth(first_id=9)],
        [growth(base_length=1000)],
        [Lost(session=1, generation=generation)],
        [b"\xff\xff"],
    ]
    return kinds[round_number % len(kinds)]


@BOTH
@PIPELINES
def test_a_hostile_second_drafter_changes_nothing(params: SamplingParams, pipeline: str) -> None:
    world = VirtualClock()
    busy = BusyTime(world)
    worker = VirtualWorker(world, DraftWorker(TableDraftEngine(GOOD, busy, 0.01), clock=busy), busy)
    link = VirtualLink(world, worker, hello=hello_for(8), welcome=welcome_of("honest", 8), delay=0.001)
    hostile = HostileChannel(world, 8)
    target = Target(
        world, TimedTable(LM, world, Pace()), [link, hostile], VirtualArrivals(world, [link, hostile]),
        pipeline=pipeline, shape=TreeShape(), num_drafters=2,
    )  # fmt: skip
    target.pool.wait_for_workers(1.0)

    def lie(round_number: int) -> None:
        if hostile.opened is not None:
            for each in nonsense(hostile.opened.generation, round_number):
                hostile.say(each)
        world.after(0.03, partial(lie, round_number + 1))

    lie(0)
    params = replace(params, max_tokens=100)
    outcome = target.serve(PROMPT, params)
    assert outcome.token_ids == plain(LM, PROMPT, params)
    assert hostile.breaches > 0
    assert hostile.opened is not None
    assert hostile.opened.generation > 2
    assert outcome.stats.accepted_by_drafter["honest"] > 30
    assert "no_drafter" not in outcome.stats.steps_by_choice
    assert outcome.stats.generations == hostile.opened.generation, "the honest one was opened once"
