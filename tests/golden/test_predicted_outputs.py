"""Requests that bring a prediction: the same answers, in fewer steps where it comes true."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from instruments import drafters
from instruments.checks import ANSWERS, PROMPT
from instruments.model_checks import CONTEXT, VOCAB, decoder, draft_engine, model_engine
from instruments.remote import Deployment, plain
from instruments.serving import Outcome, serve, table_engine
from instruments.table_drafts import relative
from instruments.table_lm import TableLM

from outrider.actors.model_runner import ModelRunner
from outrider.actors.running_batch import RunningBatch, Ticket
from outrider.models.block_pool import blocks_for
from outrider.speculation.errors import InvalidRequestError
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.request import Request
from outrider.speculation.sampling_params import SamplingParams

LM = TableLM.random(5, vocab_size=40)
LONG = TableLM.cycle([(token + 7) % 300 for token in range(300)])
WIDE = TableLM.random(6, vocab_size=300)
BOTH = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3}]
VARIED = pytest.mark.parametrize(
    ("lm", "choice"), [(LONG, BOTH[0]), (WIDE, BOTH[1])], ids=["greedy", "seeded"]
)
"""Tables whose texts do not repeat themselves, chosen so."""


def edited(text: list[int], vocab_size: int) -> list[int]:
    """One token is missing, one is new, one is another."""
    third = len(text) // 4
    strange = [(each + 1) % vocab_size for each in text]
    return [
        *text[:third],
        *text[third + 1 : 2 * third],
        strange[0],
        *text[2 * third : 3 * third],
        *strange[3 * third : 3 * third + 1],
        *text[3 * third + 1 :],
    ]


def predictions(truth: list[int], vocab_size: int) -> dict[str, list[int]]:
    junk = np.random.default_rng(1).integers(0, vocab_size, 60).tolist()
    return {
        "true": truth,
        "edited": edited(truth, vocab_size),
        "too long": [*junk[:5], *truth, *junk],
        "useless": junk,
        "one token over and over": truth[:1] * 40,
        "empty": [],
    }


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "adaptive"])
def test_any_prediction_leaves_the_answer_unchanged(name: str, adaptive: bool) -> None:
    lm = TableLM.random(5, vocab_size=7)
    accepted = 0
    for seed in range(3):
        params = SamplingParams(**{"max_tokens": 24, "temperature": 1.0, "seed": seed, **ANSWERS[name]})
        expected = serve(table_engine(lm, eos_ids=(0,)), PROMPT, params)
        for drafting in (None, drafters.Scripted(drafters.junk(6, 7, 0))):
            engine = table_engine(lm, drafting, eos_ids=(0,), adaptive=adaptive)
            for prediction in predictions(expected.token_ids, 7).values():
                outcome = serve(engine, PROMPT, params, prediction_ids=np.array(prediction, np.int64))
                assert outcome.answer == expected.answer
                accepted += outcome.stats.accepted_prediction_tokens
    assert accepted > 20


def predicted(lm: TableLM, prediction: list[int], params: SamplingParams, **request: Any) -> Outcome:
    engine = table_engine(lm, drafters.Scripted(drafters.junk(6, 40, 0)), budget=8)
    return serve(engine, PROMPT, params, prediction_ids=np.array(prediction, np.int64), **request)


@VARIED
def test_the_output_itself_takes_a_step_for_every_chain(lm: TableLM, choice: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=90, **choice)
    stats = predicted(lm, plain(lm, PROMPT, params), params).stats
    assert stats.mean_acceptance_length > 8.5
    assert stats.target_steps <= 11
    assert stats.accepted_by_drafter == {"prediction": stats.num_accepted_tokens}
    assert stats.accepted_prediction_tokens == stats.num_accepted_tokens
    assert stats.rejected_prediction_tokens == stats.num_draft_tokens - stats.num_accepted_tokens == 0
    assert stats.draft_steps == 0, "the engine's drafter has nothing to do with it"


@VARIED
def test_edits_are_got_over(lm: TableLM, choice: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=160, **choice)
    truth = plain(lm, PROMPT, params)
    stats = predicted(lm, edited(truth, 300), params).stats
    assert stats.target_steps <= 160 / 9 + 3 * 4
    assert 0 < stats.rejected_prediction_tokens <= 3 * 2 * 8


@VARIED
def test_a_useless_prediction_is_soon_not_verified_any_more(lm: TableLM, choice: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=160, **choice)
    truth = plain(lm, PROMPT, params)
    useless = [(each + 11) % 300 for each in truth]
    outcome = predicted(lm, useless, params)
    assert outcome.token_ids == truth
    assert outcome.stats.num_drafts <= 20
    assert outcome.stats.rejected_prediction_tokens <= 60


def test_speculation_switched_off_wins_over_a_prediction() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20)
    truth = plain(LONG, PROMPT, params)
    for request in ({"speculative": False}, {"num_speculative_tokens": 0}):
        stats = predicted(LONG, truth, params, **request).stats
        assert (stats.num_draft_tokens, stats.target_steps) == (0, 20)
    assert predicted(LONG, truth, params, num_speculative_tokens=1).stats.target_steps == 10


@pytest.mark.parametrize("token", [-1, 40])
def test_unknown_tokens_are_refused(token: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"prediction token {token} is not in the vocabulary of 40"):
        predicted(LM, [1, token], SamplingParams(seed=1))


def three_kinds(lm: TableLM, params: SamplingParams) -> list[dict[str, Any]]:
    """A request with a prediction, one that the engine drafts for, a plain one."""
    truth = plain(lm, [1], params)
    return [{"prediction_ids": np.array(edited(truth, lm.vocab_size))}, {}, {"speculative": False}]


@pytest.mark.parametrize("choice", BOTH, ids=["greedy", "seeded"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "adaptive"])
def test_all_kinds_share_steps_where_a_drafter_is_in_the_process(
    choice: dict[str, Any], adaptive: bool
) -> None:
    params = SamplingParams(max_tokens=60, **choice)
    truth = plain(LM, [1], params)
    drafting = drafters.Growing(drafters.levelwise(lambda text: [*[1, *truth][len(text) :][:1], 1, 2]))
    batch = RunningBatch(table_engine(LM, drafting, budget=12, depth=3, adaptive=adaptive), 3)
    tickets = [
        batch.submit(Request(prompt_ids=np.array([1]), params=params, **each))
        for each in three_kinds(LM, params)
    ]
    while batch.num_running or batch.num_waiting:
        batch.step()
    require_kinds(tickets, truth, "scripted")


def require_kinds(tickets: list[Ticket], truth: list[int], drafter: str) -> None:
    done = [each.completion for each in tickets]
    assert [None if each is None else each.token_ids for each in done] == [truth] * 3
    stats = [each.stats for each in done if each is not None]
    assert [list(each.accepted_by_drafter) for each in stats] == [["prediction"], [drafter], []]
    assert stats[0].accepted_prediction_tokens > 20
    assert stats[1].accepted_prediction_tokens == stats[1].rejected_prediction_tokens == 0


@pytest.mark.parametrize("choice", BOTH, ids=["greedy", "seeded"])
@pytest.mark.parametrize("pipeline", ["parallel", "serial"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "adaptive"])
def test_all_kinds_share_steps_where_drafters_are_elsewhere(
    choice: dict[str, Any], pipeline: str, adaptive: bool
) -> None:
    params = SamplingParams(**{"max_tokens": 60, "seed": 0, **choice})
    shape = TreeShape(num_speculative_tokens=12, depth=3, adaptive=adaptive)
    deployment = Deployment(LM, draft=relative(LM, 0.8, seed=1), pipeline=pipeline, shape=shape)
    target, truth = deployment.target, plain(LM, [1], params)
    running = [target.start([1], params, **each) for each in three_kinds(LM, params)]
    target.finish(running)
    assert [each.token_ids for each in running] == [truth] * 3
    names = [list(each.stats.accepted_by_drafter) for each in running]
    assert names == [["prediction"], ["draft-0"], []]
    alone = target.serve([1], params, prediction_ids=np.array(truth))
    assert (alone.token_ids, alone.stats.growth_messages) == (truth, 0)
    assert alone.stats.target_steps <= 60 / 13 + 4
    deployment.require_empty()


def test_a_prediction_says_nothing_about_drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps are not judged by the clock as the drafter's, and teach nothing about its scores."""
    params = SamplingParams(temperature=0.0, max_tokens=60)
    drafting = drafters.Growing(drafters.levelwise(lambda _: [1]))
    engine = table_engine(LONG, drafting, adaptive=True)
    before = engine.costs.hit_probability
    judged: list[int] = []
    monkeypatch.setattr(engine.costs.record, "observe", lambda batch, **_: judged.append(batch))
    truth = plain(LONG, PROMPT, params)
    outcome = serve(engine, PROMPT, params, prediction_ids=np.array(truth))
    assert outcome.stats.accepted_prediction_tokens > 40
    assert (judged, engine.costs.hit_probability) == ([], before)
    assert serve(engine, PROMPT, params).stats.target_steps == 1 + len(judged), "all but the prompt's"


@pytest.fixture(scope="module")
def folder(make_model_folder: Any) -> Path:
    made: Path = make_model_folder("llama", max_position_embeddings=CONTEXT)
    return made


def test_on_a_network_with_little_memory(folder: Path) -> None:
    """Chains' KV, chunks, preemption and all kinds of requests together."""
    network = decoder(folder, torch.float32)
    least = blocks_for(CONTEXT)

    def request(number: int) -> Request:
        rng = np.random.default_rng(number)
        params = SamplingParams(
            temperature=float(number % 2), seed=number, max_tokens=40, repetition_penalty=1.2, ignore_eos=True
        )
        return Request(prompt_ids=rng.integers(1, VOCAB, int(rng.integers(1, 100))), params=params)

    def tokens_of(batch: RunningBatch, requests: list[Request]) -> list[Ticket]:
        tickets = [batch.submit(each) for each in requests]
        while batch.num_running or batch.num_waiting:
            batch.step()
        return tickets

    requests = [request(number) for number in range(12)]
    alone = RunningBatch(model_engine(ModelRunner(network, num_blocks=4 * least), None), 1)
    truths = [list(each.token_ids) for each in tokens_of(alone, requests)]
    draft = ModelRunner(network, num_blocks=8 * (least + 8))
    runner = ModelRunner(network, num_blocks=least + 4)
    batch = RunningBatch(model_engine(runner, draft_engine(draft), depth=2), 6)
    mixed = [
        replace(
            each,
            prediction_ids=np.array(edited(truth, VOCAB)) if number % 3 else None,
            speculative=number % 4 > 0,
        )
        for number, (each, truth) in enumerate(zip(requests, truths, strict=True))
    ]
    tickets = tokens_of(batch, mixed)
    assert [each.token_ids for each in tickets] == truths
    assert batch.num_preemptions > 2
    runner.cache.check_idle()
    done = [each.completion for each in tickets if each.completion is not None]
    assert sum(each.stats.accepted_prediction_tokens for each in done) > 100
