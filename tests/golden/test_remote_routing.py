"""Requests are drafted for where it is fastest: near and far, fast and slow workers, and such that change."""

from dataclasses import replace

import pytest
from instruments.remote import Deployment, Finished, Pace, plain
from instruments.table_lm import TableLM

from outrider.speculation.replication.routing import PATIENCE
from outrider.speculation.sampling_params import SamplingParams

PROMPT = [1, 2, 3]
LM = TableLM.random(3, vocab_size=5, order=2)
GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=190)
TARGET = Pace(target=0.2, draft=0.02)
"""A slow target, so that few steps take long."""
NEAR, FAR = TARGET, replace(TARGET, delay=0.15)
FAST, SLOW = TARGET, replace(TARGET, draft=0.15)
UNLIKE = pytest.mark.parametrize("other", [FAR, SLOW], ids=["far", "slow"])


def finish(deployment: Deployment, *running: Finished) -> None:
    deployment.target.finish(running)
    for each in running:
        assert each.token_ids == plain(LM, PROMPT, each.run.request.params)


def warmed_up(*paces: Pace) -> Deployment:
    """Workers of which each has been drafted with for a while."""
    deployment = Deployment(LM, pace=paces, num_workers=len(paces))
    for _ in paces:
        deployment.target.serve(PROMPT, replace(GREEDY, max_tokens=20))
    assert all(link.pace.alone is not None for link in deployment.target.pool._links)
    return deployment


@UNLIKE
def test_each_worker_is_tried_and_then_the_better_one_is_used(other: Pace) -> None:
    deployment = warmed_up(other, NEAR)
    for _ in range(3):
        outcome = deployment.target.serve(PROMPT, replace(GREEDY, max_tokens=20))
        assert set(outcome.stats.accepted_by_drafter) == {"draft-1"}
        assert outcome.stats.generations == 1


@UNLIKE
@pytest.mark.parametrize("pipeline", ["parallel", "serial", "pearl"])
def test_a_request_does_not_stay_where_it_is_slow_while_a_fast_worker_idles(
    other: Pace, pipeline: str
) -> None:
    """Also if nobody has ever tried that one."""
    deployment = Deployment(LM, pace=(other, NEAR), num_workers=2, pipeline=pipeline)
    outcome = deployment.target.start(PROMPT, GREEDY)
    finish(deployment, outcome)
    assert (outcome.stats.drafter_moves, outcome.stats.drafter_failovers) == (1, 0)
    assert outcome.stats.accepted_by_drafter["draft-1"] > 50
    deployment.require_empty()


def test_a_request_comes_back_from_a_worker_that_was_not_worth_a_trial() -> None:
    deployment = Deployment(LM, pace=(NEAR, replace(FAR, draft=0.15)), num_workers=2)
    outcome = deployment.target.start(PROMPT, GREEDY)
    finish(deployment, outcome)
    assert (outcome.stats.drafter_moves, outcome.stats.drafter_failovers) == (2, 0)
    accepted = outcome.stats.accepted_by_drafter
    assert accepted["draft-0"] > 5 * accepted.get("draft-1", 0)
    deployment.require_empty()


def test_a_request_leaves_a_worker_that_slows_down() -> None:
    deployment = warmed_up(FAST, FAST)
    outcome = deployment.target.start(PROMPT, GREEDY)
    (feed,) = outcome.run._draft.feeds  # type: ignore[union-attr]
    before = int(feed.name[-1])
    slowed_at = deployment.world.now + 2.0

    def slow_down() -> None:
        deployment.engines[before].seconds = 0.4

    deployment.world.after(2.0, slow_down)
    finish(deployment, outcome)
    assert (outcome.stats.drafter_moves, outcome.stats.drafter_failovers) == (1, 0)
    assert feed.name == f"draft-{1 - before}"
    assert feed.opened_at < slowed_at + 3 * PATIENCE
    assert outcome.accepted_after(feed.opened_at) > 40


def test_equal_workers_are_not_changed() -> None:
    deployment = warmed_up(NEAR, NEAR)
    running = [deployment.target.start(PROMPT, replace(GREEDY, seed=seed)) for seed in range(3)]
    finish(deployment, *running)
    assert running[0].times[-1] - running[0].times[0] > 2 * PATIENCE, "too short to show anything"
    assert sum(outcome.stats.drafter_moves for outcome in running) == 0
    assert len({name for each in running for name in each.stats.accepted_by_drafter}) == 2


def test_requests_spread_over_workers_by_their_speed() -> None:
    """What the load makes of the fast one is measured, and those that came too many move on."""
    deployment = warmed_up(FAST, SLOW)
    running = [deployment.target.start(PROMPT, replace(GREEDY, seed=seed)) for seed in range(6)]
    counts = [len(link.feeds) for link in deployment.target.pool._links]
    finish(deployment, *running)
    assert counts[0] > counts[1]
    assert sum(outcome.stats.drafter_failovers for outcome in running) == 0
    deployment.require_empty()
