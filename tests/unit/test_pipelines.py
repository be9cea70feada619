"""Decisions of the pipelines whose drafter is in another process, and shares of a batch."""

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest

from outrider.speculation.living_tree import LivingTree
from outrider.speculation.pipelines.actions import Linger, Round, Verify, Wait
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.pipelines.parallel import ParallelPipeline
from outrider.speculation.pipelines.patience import LEAST_PATIENCE, MAX_PATIENCE, PAUSE
from outrider.speculation.pipelines.remote_serial import OTHERS, RemoteSerialPipeline
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.pipelines.tree_yield import TreeYield
from outrider.speculation.replication.pace import GrowthTimes, LinkPace
from outrider.speculation.selection import share_budget
from outrider.speculation.step_cost import StepCostModel
from outrider.speculation.tree import ROOT, Law


@dataclass
class Draft:
    """A ``RemoteDraft`` that does as it is told."""

    tree: LivingTree = field(default_factory=lambda: LivingTree(Law.COUPLED))
    round: Round = field(default_factory=lambda: Round(began=0.0, allowed=4))
    steps_after_commit: int = 4
    reachable: bool = True
    times: GrowthTimes = field(default_factory=lambda: GrowthTimes(LinkPace(), 0.0))

    @property
    def feeds(self) -> "list[Draft]":
        return [self] if self.reachable else []

    def commit(self, now: float) -> None:
        self.round = Round(began=now, allowed=self.steps_after_commit)

    def answer(self, now: float, *, step: float = 0.01) -> None:
        """The drafter has taken all its steps."""
        self.round.steps, self.round.seconds = self.round.allowed, step * self.round.allowed
        self.round.ended = now


def serial(*, adaptive: bool = True, depth: int = 6) -> RemoteSerialPipeline:
    curve = 0.05 * (1 + 0.01 * np.arange(64))
    shape = TreeShape(adaptive=adaptive, depth=depth)
    return RemoteSerialPipeline(shape, CostEstimates(StepCostModel(curve)))


@pytest.mark.parametrize("adaptive", [True, False])
def test_parallel_does_not_wait_for_what_it_knows_nothing_of(adaptive: bool) -> None:
    """Whatever the drafter does: not there, silent, in the middle of something, done."""
    pipeline = ParallelPipeline(TreeShape(adaptive=adaptive), CostEstimates())
    draft = Draft()
    for reachable, allowed, ended in itertools.product([True, False], [0, -1, 5], [None, 0.1]):
        draft.reachable, draft.round = reachable, Round(began=0.0, allowed=allowed, ended=ended)
        assert isinstance(pipeline.decide(draft, 0.05), Verify)


def test_parallel_verifies_what_pays() -> None:
    curve = 0.05 * (1 + 0.1 * np.arange(64))
    pipeline = ParallelPipeline(TreeShape(), CostEstimates(StepCostModel(curve)))
    draft = Draft()
    assert pipeline.decide(draft, 0.0) == Verify(0)
    draft.tree.add([ROOT] * 4, [1, 2, 3, 4], [0.9, 0.5, 0.05, 0.01])
    assert pipeline.decide(draft, 0.0) == Verify(2)


def test_parallel_tries_a_drafter_that_lost_its_credit_again() -> None:
    curve = 0.05 * (1 + 0.1 * np.arange(64))
    pipeline, draft = ParallelPipeline(TreeShape(), CostEstimates(StepCostModel(curve))), Draft()
    draft.tree.add([ROOT], [1], [1.0])
    budgets = []
    for _ in range(300):
        action = pipeline.decide(draft, 0.0)
        budgets.append(action.budget)
        pipeline.costs.observe_verdict(0, action.budget, float(action.budget))
    assert 0 in budgets, "what never is accepted is verified for ever"
    assert 1 in budgets[budgets.index(0) :], "it is never tried again"
    assert sum(budgets[-100:]) < 50


def test_serial_waits_for_the_answer_and_then_verifies() -> None:
    pipeline, draft = serial(), Draft()
    assert pipeline.decide(draft, 0.0) == Wait(MAX_PATIENCE)
    assert pipeline.decide(draft, 0.1) == Wait(MAX_PATIENCE)
    draft.tree.add([ROOT], [1], [0.9])
    draft.answer(0.15)
    assert pipeline.decide(draft, 0.15) == Verify(1)
    assert pipeline.costs.draft_seconds == pytest.approx(0.01)
    assert pipeline.costs.round_trip == pytest.approx(0.11)


def test_serial_does_not_wait_for_nobody_or_nothing() -> None:
    assert isinstance(serial().decide(Draft(reachable=False), 0.0), Verify)
    assert isinstance(serial().decide(Draft(round=Round(began=0.0, allowed=0)), 0.0), Verify)


def test_serial_is_late_once_and_recovers() -> None:
    pipeline, draft = serial(), Draft()
    assert isinstance(pipeline.decide(draft, 0.0), Wait)
    assert isinstance(pipeline.decide(draft, MAX_PATIENCE), Verify)
    for step in range(1, 5):
        draft.commit(float(step))
        assert isinstance(pipeline.decide(draft, float(step)), Verify), "it waits for a late drafter"
    draft.answer(4.1)
    assert isinstance(pipeline.decide(draft, 4.1), Verify)
    draft.commit(5.0)
    assert isinstance(pipeline.decide(draft, 5.0), Wait)


def test_serial_waits_a_few_expected_rounds_at_most() -> None:
    pipeline, draft = serial(adaptive=False, depth=2), Draft()
    pipeline.decide(draft, 0.0)
    draft.round.allowed = 1
    draft.answer(0.012)
    pipeline.decide(draft, 0.012)
    draft.commit(1.0)
    waiting = pipeline.decide(draft, 1.0)
    assert isinstance(waiting, Wait)
    assert waiting.until == pytest.approx(1.0 + 4 * (0.002 + 2 * 0.01))
    draft.answer(1.05)
    pipeline.decide(draft, 1.05)
    draft.round = Round(began=2.0, allowed=1)
    waiting = pipeline.decide(draft, 2.0)
    assert isinstance(waiting, Wait)
    assert LEAST_PATIENCE <= waiting.until - 2.0 <= MAX_PATIENCE


def test_a_round_that_begins_while_serial_waits_begins_no_new_wait() -> None:
    """Worker after worker may fail and hand over; the target must not wait for each of them."""
    pipeline, draft = serial(), Draft()
    assert isinstance(pipeline.decide(draft, 0.0), Wait)
    draft.commit(0.19)
    assert pipeline.decide(draft, 0.19) == Wait(MAX_PATIENCE)
    draft.commit(0.2)
    assert isinstance(pipeline.decide(draft, 0.2), Verify)


@dataclass
class Several:
    """A ``RemoteDraft`` with several feeds."""

    feeds: list[Draft]
    tree: LivingTree = field(default_factory=lambda: LivingTree(Law.COUPLED))
    steps_after_commit: int = 4

    def commit(self, now: float) -> None:
        for feed in self.feeds:
            behind = feed.round.ended is None
            feed.round = Round(began=now, allowed=self.steps_after_commit, behind=behind)


def test_serial_waits_for_all_that_answer_about_as_soon_as_the_first() -> None:
    pipeline, draft = serial(adaptive=False), Several([Draft(), Draft()])
    assert pipeline.decide(draft, 0.0) == Wait(MAX_PATIENCE)
    draft.feeds[1].answer(0.04)
    assert pipeline.decide(draft, 0.04) == Wait(OTHERS * 0.04)
    draft.feeds[0].answer(0.05)
    assert isinstance(pipeline.decide(draft, 0.05), Verify)
    assert pipeline.costs.round_trip == pytest.approx(0.01), "of the one that was waited for"


def test_serial_waits_for_one_that_drafts_beside_one_that_has_nothing_to_say() -> None:
    pipeline, draft = serial(adaptive=False), Several([Draft(), Draft()])
    draft.feeds[0].round.ended = 0.0005
    assert pipeline.decide(draft, 0.002) == Wait(MAX_PATIENCE)
    draft.feeds[1].answer(0.05)
    assert isinstance(pipeline.decide(draft, 0.05), Verify)


def test_serial_does_not_wait_again_for_one_that_lags_behind_another() -> None:
    """And one that lags keeps nobody from waiting for the other."""
    pipeline, draft = serial(adaptive=False), Several([Draft(), Draft()])
    quick, slow = draft.feeds
    quick.answer(0.04)
    assert isinstance(pipeline.decide(draft, OTHERS * 0.04), Verify)
    for now in (1.0, 2.0):
        draft.commit(now)
        assert isinstance(pipeline.decide(draft, now), Wait)
        quick.answer(now + 0.04)
        assert isinstance(pipeline.decide(draft, now + 0.04), Verify), "it waits for the one that lags"
    slow.answer(2.05)
    draft.commit(3.0)
    quick.answer(3.04)
    assert isinstance(pipeline.decide(draft, 3.04), Wait), "it has caught up"
    draft.feeds.remove(slow)
    assert isinstance(pipeline.decide(draft, 3.04), Verify)


def test_serial_does_not_wait_for_one_that_takes_in_the_text_while_another_drafts() -> None:
    pipeline, draft = serial(adaptive=False), Several([Draft(), Draft()])
    draft.feeds[1].round.opening = True
    draft.feeds[0].answer(0.04)
    assert isinstance(pipeline.decide(draft, 0.04), Verify)


def test_serial_knows_that_several_expand_more_nodes_in_a_step() -> None:
    pipeline, draft = serial(adaptive=False), Several([Draft(), Draft()])
    count = 2 * pipeline.shape.width
    above = draft.tree.add([ROOT] * count, range(count), [0.9] + [0.01] * (count - 1))
    draft.tree.add(above, [0] * count, [0.9] * count)
    for feed in draft.feeds:
        feed.answer(0.04)
    pipeline.decide(draft, 0.04)
    learnt, expected = pipeline.costs.trees, {}
    for drafters in (1, 2):
        expected[drafters] = TreeYield()
        expected[drafters].observe_tree(draft.tree, drafters * pipeline.shape.width, 4)
    assert (learnt.tokens(6, 16) == expected[2].tokens(6, 16)).all()
    assert (learnt.tokens(6, 16) != expected[1].tokens(6, 16)).any()


def test_parallel_looks_at_whose_growth_comes_first() -> None:
    pipeline = ParallelPipeline(TreeShape(), CostEstimates())
    feeds = []
    for answer in (0.03, 0.01, 0.02):
        pace = LinkPace()
        pace.observe_answer(answer)
        pace.observe_interval(answer / 2)
        feeds.append(Draft(times=GrowthTimes(pace, 1.0)))
    offer = pipeline.decide(Several([*feeds, Draft()]), 1.0)
    assert isinstance(offer, Linger)
    assert (offer.due, offer.every) == (pytest.approx(1.01), pytest.approx(0.005))
    assert isinstance(pipeline.decide(Several([Draft()]), 1.0), Verify)


def test_serial_stops_drafting_that_does_not_pay_and_tries_again() -> None:
    """The drafter's "nothing to do" is never back before the next commit."""
    pipeline, draft = serial(), Draft()
    now, allowed = 0.0, list[int]()
    for _ in range(600):
        if draft.steps_after_commit:
            draft.answer(now, step=0.03)
        pipeline.decide(draft, now)
        if allowed and allowed[-1]:
            pipeline.costs.observe_verdict(0, 1, 1.0)
        allowed.append(draft.steps_after_commit)
        draft.commit(now)
        now += 0.05
    assert allowed[0] > 0
    first = allowed.index(0)
    assert first < 40, "it goes on with what does not pay"
    assert sum(allowed[first:]) > 0, "it never tries again"
    assert sum(map(bool, allowed[first:])) < 100


def test_an_estimate_of_zero_is_left_again() -> None:
    """Clocks disagree: the first round may seem to have taken no time beside its steps."""
    costs = CostEstimates()
    for seconds in (0.0, 0.02, 0.02):
        costs.observe_round_trip(seconds)
        costs.observe_draft_step(seconds)
    assert costs.round_trip == costs.draft_seconds == pytest.approx(0.02)


def test_a_stall_is_not_the_drafter_s_cost() -> None:
    costs = CostEstimates()
    for seconds in (0.01, 9.0):
        costs.observe_draft_step(seconds)
        costs.observe_round_trip(seconds)
    assert costs.draft_seconds == costs.round_trip == pytest.approx(0.01 + 0.05 * 0.03)


@pytest.mark.parametrize("seed", range(30))
def test_shares_of_a_batch_are_the_best_by_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch = int(rng.integers(1, 4))
    scores = [np.sort(rng.random(int(rng.integers(0, 5))))[::-1] for _ in range(batch)]
    seconds = np.cumsum(rng.random(batch + int(rng.integers(0, 9))) * 0.02) + 0.03

    def rate(shares: tuple[int, ...]) -> float:
        tokens = batch + sum(float(each[:count].sum()) for each, count in zip(scores, shares, strict=True))
        return tokens / float(seconds[batch + sum(shares) - 1])

    possible = [
        shares
        for shares in itertools.product(*(range(len(each) + 1) for each in scores))
        if batch + sum(shares) <= len(seconds)
    ]
    shares = tuple(share_budget(scores, seconds))
    assert shares in possible
    assert rate(shares) == pytest.approx(max(map(rate, possible)))


def test_more_requests_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="3 requests and 0 other rows do not fit 2 rows"):
        share_budget([np.zeros(0)] * 3, [0.1, 0.2])


def test_serial_waits_again_when_the_lost_time_is_made_good() -> None:
    """Its drafter may be as fast as ever again, and nothing but waiting would show it."""
    pipeline, draft = serial(adaptive=False), Draft()
    assert isinstance(pipeline.decide(draft, 0.0), Wait)
    assert isinstance(pipeline.decide(draft, MAX_PATIENCE), Verify)
    now, waits = MAX_PATIENCE, []
    while now < 3 * PAUSE * MAX_PATIENCE:
        # The answer to each commit comes while the target computes, so it is never at hand in time.
        draft.commit(now)
        action = pipeline.decide(draft, now)
        if isinstance(action, Wait):
            waits.append(now)
            now += 0.03
            draft.answer(now)
            assert isinstance(pipeline.decide(draft, now), Verify)
        now += 0.05
    assert waits[0] > PAUSE * MAX_PATIENCE
    assert len(waits) > 80, "it does not go on waiting for a drafter that answers again"


def test_a_drafter_that_stays_late_costs_little() -> None:
    pipeline, draft, now, lost = serial(), Draft(), 0.0, 0.0
    while now < 60.0:
        draft.commit(now)
        action = pipeline.decide(draft, now)
        if isinstance(action, Wait):
            lost += action.until - now
            now = action.until
            assert isinstance(pipeline.decide(draft, now), Verify)
        now += 0.05
    assert lost < 60.0 / PAUSE + MAX_PATIENCE
