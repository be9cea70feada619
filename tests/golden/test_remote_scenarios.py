"""Drafting in other processes on TableLM: exact output, whatever drafters and networks do."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
from instruments.checks import CYCLE, letters
from instruments.remote import Deployment, Finished, Pace, Recorded, fault_at, plain
from instruments.serving import EOS
from instruments.table_drafts import relative
from instruments.table_lm import TableLM

from outrider.actors.virtual import Faults
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.replication.messages import Close, Commit, Growth, Open
from outrider.speculation.sampling_params import SamplingParams

PROMPT = [1, 2, 3]
GREEDY = SamplingParams(temperature=0.0, seed=0)
SEEDED = SamplingParams(temperature=1.0, seed=11)
BOTH = pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
PIPELINES = pytest.mark.parametrize("pipeline", ["parallel", "serial", "pearl"])
LM = TableLM.random(3, vocab_size=5, order=2)
GOOD = relative(LM, 0.8, seed=1)
OTHER = relative(LM, 0.6, seed=2)
FIXED = TreeShape(num_speculative_tokens=12, depth=3, adaptive=False)
SHORT = 14
SLOW_DRAFTS = Pace(draft=0.02)
"""Few messages per step: every one of them has its turn in the tests of faults."""


@BOTH
@PIPELINES
@pytest.mark.parametrize("shape", [FIXED, TreeShape()], ids=["fixed", "adaptive"])
def test_output_has_the_exact_length_and_tokens(
    params: SamplingParams, pipeline: str, shape: TreeShape
) -> None:
    accepted = 0
    for max_tokens in range(1, 13):
        wanted = replace(params, max_tokens=max_tokens)
        deployment = Deployment(LM, draft=GOOD, pipeline=pipeline, shape=shape)
        outcome = deployment.target.serve(PROMPT, wanted)
        assert outcome.token_ids == plain(LM, PROMPT, wanted)
        assert outcome.steps[-1].finish_reason == "length"
        assert outcome.streamed == outcome.run.text == letters(outcome.token_ids)
        deployment.require_empty()
        accepted += outcome.stats.num_accepted_tokens
    assert accepted > 20


@PIPELINES
def test_output_ends_at_the_first_committed_eos(pipeline: str) -> None:
    """Within the accepted path, as the target's own token, and never at a sibling that was refused."""
    lm = TableLM.cycle(CYCLE)
    shape = replace(FIXED, num_speculative_tokens=40, width=8, children=8, min_score=0.0)
    seen: set[str] = set()
    for agreement in (1.0, 0.6):
        for start in (EOS, 1, 2, 3, 4, 5, 6):
            truth = lm.greedy([7, start], 20)
            expected = truth[: truth.index(EOS) + 1]
            draft = relative(lm, agreement, seed=start)
            deployment = Deployment(lm, draft=draft, pipeline=pipeline, shape=shape, eos_ids=(EOS,))
            outcome = deployment.target.serve([7, start], replace(GREEDY, max_tokens=12))
            assert outcome.token_ids == expected
            assert outcome.answer[3:] == ("stop", None)
            assert outcome.streamed == outcome.run.text == letters(expected[:-1])
            deployment.require_empty()
            seen |= places_of_eos(deployment, outcome)
    # A chain has no siblings.
    assert seen == {"inside", "own token"} | ({"refused sibling"} if pipeline != "pearl" else set())


def places_of_eos(deployment: Deployment, outcome: Finished) -> set[str]:
    last = outcome.steps[-1]
    places = {"inside" if last.num_accepted == len(last.token_ids) else "own token"}
    trees = deployment.target.lm.trees[:-1]
    return places | ({"refused sibling"} if any(EOS in tree.tokens for tree in trees) else set())


@PIPELINES
@pytest.mark.parametrize("lag", [0, 1])
def test_stop_strings_may_straddle_the_bonus_token(pipeline: str, lag: int) -> None:
    lm = TableLM.cycle(CYCLE)
    text = letters(lm.greedy([7, 1], 24))
    straddled = 0
    for start in range(8):
        for length in (2, 3):
            stop = text[start : start + length]
            params = replace(GREEDY, max_tokens=16, stop=(stop,), ignore_eos=True)
            deployment = Deployment(lm, pipeline=pipeline, shape=FIXED, lag=lag)
            outcome = deployment.target.serve([7, 1], params)
            plainly = deployment.target.serve([7, 1], params, speculative=False)
            assert outcome.answer == plainly.answer
            assert (outcome.run.text, outcome.answer[-1]) == (text[:start], stop)
            ends = {sum(len(step.token_ids) for step in outcome.steps[:n]) for n in range(len(outcome.steps))}
            straddled += bool(ends & set(range(start + 1, start + length)))
    assert straddled > 3


FAULTS: dict[str, Sequence[float]] = {
    "lost": (),
    "doubled": (0.0, 0.0),
    "doubled late": (0.0, 0.07),
    "swapped with the next": (1.5 * SLOW_DRAFTS.draft,),
    "swapped with a later step's": (1.2 * SLOW_DRAFTS.target,),
    "delayed by several steps": (5 * SLOW_DRAFTS.target,),
}


@cache
def faultless_run(
    pipeline: str, params: SamplingParams, drafters: int = 1
) -> tuple[Recorded, Recorded, Finished]:
    to_worker, to_target = Recorded(), Recorded()
    return to_worker, to_target, short_run(pipeline, params, (to_worker, to_target), drafters)


def short_run(
    pipeline: str, params: SamplingParams, faults: tuple[Faults, Faults], drafters: int = 1
) -> Finished:
    """With several drafters the others' links are sound."""
    deployment = Deployment(
        LM,
        draft=[GOOD, *[OTHER] * (drafters - 1)],
        pipeline=pipeline,
        faults=faults,
        sound=drafters - 1,
        per_request=drafters,
        pace=SLOW_DRAFTS,
    )
    outcome = deployment.target.serve(PROMPT, params)
    assert outcome.token_ids == plain(LM, PROMPT, params)
    deployment.require_empty(expired=True)
    return outcome


@BOTH
@PIPELINES
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("direction", ["to worker", "to target"])
def test_any_one_message_may_suffer(
    params: SamplingParams, pipeline: str, fault: str, direction: str
) -> None:
    """Every message of a short run in turn: the same output, nothing left behind, no stall."""
    params = replace(params, max_tokens=SHORT)
    to_worker, to_target, reference = faultless_run(pipeline, params)
    assert reference.stats.num_accepted_tokens >= 3
    assert reference.stats.generations == 1
    messages = to_worker.messages if direction == "to worker" else to_target.messages
    generations = 0
    for index in range(len(messages)):
        faulty, fine = fault_at(index, FAULTS[fault]), fault_at(-1, ())
        faults = (faulty, fine) if direction == "to worker" else (fine, faulty)
        outcome = short_run(pipeline, params, faults)
        assert len(outcome.steps) <= SHORT
        assert outcome.times[-1] < SHORT * (SLOW_DRAFTS.target + 0.02 + 0.25)
        generations += outcome.stats.generations - 1
    assert generations == 0 if "doubled" in fault else generations > 0 or direction == "to worker"


@pytest.mark.parametrize("pipeline", ["parallel", "serial"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("direction", ["to worker", "to target"])
def test_any_one_message_may_suffer_where_several_draft(pipeline: str, fault: str, direction: str) -> None:
    """Every message of one drafter in turn: the other goes on as if nothing had happened."""
    params = replace(SEEDED, max_tokens=SHORT)
    to_worker, to_target, reference = faultless_run(pipeline, params, 2)
    assert reference.stats.generations == 2
    messages = to_worker.messages if direction == "to worker" else to_target.messages
    for index in range(len(messages)):
        faulty, fine = fault_at(index, FAULTS[fault]), fault_at(-1, ())
        faults = (faulty, fine) if direction == "to worker" else (fine, faulty)
        outcome = short_run(pipeline, params, faults, 2)
        assert outcome.times[-1] < SHORT * (SLOW_DRAFTS.target + 0.02 + 0.25)
        assert outcome.stats.steps_by_choice.get("no_drafter", 0) == 0
        assert outcome.stats.drafter_failovers == 0
        if "doubled" in fault:
            assert outcome.stats.generations == 2


def test_the_faults_strike_messages_of_all_kinds() -> None:
    """Or the test above would say little."""
    to_worker, to_target, _ = faultless_run("parallel", replace(GREEDY, max_tokens=SHORT))
    assert {type(message) for message in to_worker.messages} == {Open, Commit, Close}
    assert sum(isinstance(message, Commit) for message in to_worker.messages) >= 2
    assert sum(isinstance(message, Growth) for message in to_target.messages) >= 8


@PIPELINES
def test_a_lost_close_leaves_a_session_until_it_expires(pipeline: str) -> None:
    def no_close(_: int, message: object) -> Sequence[float]:
        return () if isinstance(message, Close) else (0.0,)

    deployment = Deployment(LM, pipeline=pipeline, faults=(no_close, fault_at(-1, ())))
    deployment.target.serve(PROMPT, replace(GREEDY, max_tokens=SHORT))
    deployment.settle()
    assert deployment.num_sessions == 1
    deployment.require_empty(expired=True)


@BOTH
@PIPELINES
def test_a_perfect_drafter_saves_forwards(params: SamplingParams, pipeline: str) -> None:
    params = replace(params, max_tokens=40)
    deployment = Deployment(LM, pipeline=pipeline)
    outcome = deployment.target.serve(PROMPT, params)
    assert outcome.token_ids == plain(LM, PROMPT, params)
    assert deployment.target.lm.forwards == len(outcome.steps) <= 12
    assert outcome.streamed == letters(outcome.token_ids)


@BOTH
@PIPELINES
@pytest.mark.parametrize("shape", [FIXED, TreeShape()], ids=["fixed", "adaptive"])
def test_a_drafter_that_is_always_wrong_costs_no_forward(
    params: SamplingParams, pipeline: str, shape: TreeShape
) -> None:
    """Exactly plain decoding's forwards; ``Target.step`` requires each to commit something."""
    params = replace(params, max_tokens=25)
    deployment = Deployment(LM, pipeline=pipeline, shape=shape, skip=1)
    outcome = deployment.target.serve(PROMPT, params)
    assert outcome.token_ids == plain(LM, PROMPT, params)
    assert deployment.target.lm.forwards == 25
    # After a miss all but the serial pipeline go on with what has arrived: here, nothing.
    assert outcome.stats.growth_nodes > 0
    assert outcome.stats.num_draft_tokens > 0 or pipeline != "serial"
    assert outcome.stats.num_accepted_tokens == 0
    assert outcome.streamed == outcome.run.text == letters(outcome.token_ids)


@BOTH
@PIPELINES
@pytest.mark.parametrize("copies", [(0.0, 0.0), (0.0, 0.03, 0.06)], ids=["at once", "later"])
def test_everything_said_twice(params: SamplingParams, pipeline: str, copies: Sequence[float]) -> None:
    """Duplicates end no generation and cost no forward; a wait may be judged a little longer."""

    def repeated(_: int, message: object) -> Sequence[float]:  # noqa: ARG001
        return copies

    params = replace(params, max_tokens=20)
    # PEARL's window follows the drafter's pace, which duplicates hide.
    shape = TreeShape(num_speculative_tokens=4, adaptive=pipeline != "pearl")
    reference = Deployment(LM, draft=GOOD, pipeline=pipeline, shape=shape).target.serve(PROMPT, params)
    deployment = Deployment(LM, draft=GOOD, pipeline=pipeline, shape=shape, faults=(repeated, repeated))
    outcome = deployment.target.serve(PROMPT, params)
    assert outcome.token_ids == plain(LM, PROMPT, params)
    assert outcome.stats.generations == 1
    assert len(outcome.steps) == len(reference.steps)
    assert outcome.times[-1] < 1.1 * reference.times[-1]
    deployment.require_empty()


@BOTH
@PIPELINES
def test_requests_of_one_batch_are_what_they_are_alone(params: SamplingParams, pipeline: str) -> None:
    wanted = [replace(params, max_tokens=length, seed=length) for length in (6, 20, 13, 1)]
    prompts = [PROMPT, [4], [2, 2], [0, 1, 0, 1]]
    deployment = Deployment(LM, draft=GOOD, pipeline=pipeline, max_sessions=3)
    running = [deployment.target.start(prompt, each) for prompt, each in zip(prompts, wanted, strict=True)]
    deployment.target.finish(running)
    for outcome, prompt, each in zip(running, prompts, wanted, strict=True):
        assert outcome.token_ids == plain(LM, prompt, each)
        assert outcome.streamed == letters(outcome.token_ids)
    assert sum(outcome.stats.num_accepted_tokens for outcome in running) > 10
    assert deployment.target.lm.forwards == max(len(outcome.steps) for outcome in running)
    deployment.require_empty()


@BOTH
@PIPELINES
def test_several_targets_share_a_worker(params: SamplingParams, pipeline: str) -> None:
    """Their sessions have the same numbers, and nothing of one gets into another."""
    wanted = [replace(params, max_tokens=24, seed=seed) for seed in (1, 2, 3)]
    prompts = [PROMPT, [4], [2, 2]]
    deployment = Deployment(LM, draft=GOOD, pipeline=pipeline, num_targets=3)
    running = [
        target.start(prompt, each)
        for target, prompt, each in zip(deployment.targets, prompts, wanted, strict=True)
    ]
    while not all(each.run.finished for each in running):
        for target, each in zip(deployment.targets, running, strict=True):
            if not each.run.finished:
                target.step([each])
    for outcome, prompt, params in zip(running, prompts, wanted, strict=True):
        outcome.run.close()
        assert outcome.token_ids == plain(LM, prompt, params)
        assert outcome.stats.num_accepted_tokens > 0
        assert outcome.stats.generations == 1
    deployment.require_empty()
