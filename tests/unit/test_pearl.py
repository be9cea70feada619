"""PEARL's state machine: its calls, its speed, its phases."""

import itertools

import pytest

from outrider.cluster.simulator import Costs, Simulated, simulate, straight_curve
from outrider.speculation.living_tree import LivingTree
from outrider.speculation.pipelines.actions import Round, Verify, Wait
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.pipelines.pearl import FIRST_WINDOW, LEAST_WINDOW, PearlPipeline, Phase
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.replication.pace import GrowthTimes, LinkPace
from outrider.speculation.step_cost import StepCostModel
from outrider.speculation.tree import ROOT, Law

MS = 1e-3
TOKENS = 400


class Draft:
    """A ``RemoteDraft`` with a chain of so many nodes."""

    def __init__(self, nodes: int) -> None:
        self.tree = LivingTree(Law.COUPLED)
        parent = ROOT
        for token in range(nodes):
            (parent,) = self.tree.add([parent], [token], [0.9])
        self.round = Round(began=0.0, allowed=4)
        self.times = GrowthTimes(LinkPace(), 0.0)
        self.steps_after_commit = 0
        self.reachable = True

    @property
    def feeds(self) -> "list[Draft]":
        return [self] if self.reachable else []


def pipeline(window: int | None = 4) -> PearlPipeline:
    shape = TreeShape(num_speculative_tokens=window or 16, adaptive=window is None, depth=16)
    return PearlPipeline(shape, CostEstimates(StepCostModel([8 * MS])))


def run(acceptance: float, ratio: float, window: int, tokens: int = TOKENS, seed: int = 0) -> Simulated:
    costs = Costs(acceptance=(acceptance,), target=straight_curve(ratio * MS, 0.0, 64), draft=(MS,))
    shape = TreeShape(num_speculative_tokens=window, depth=window, adaptive=False)
    return simulate(costs, "pearl", shape=shape, tokens=tokens, seed=seed)


@pytest.mark.parametrize(("window", "calls"), [(4, 16), (5, 13)])
def test_calls_with_the_target_as_its_own_drafter(window: int, calls: int) -> None:
    """One before the first window, then a window each: 1 + ceil(59 / window)."""
    found = run(1.0, window, window, tokens=60)
    assert found.stats.target_steps == calls
    assert found.seconds == pytest.approx(calls * window * MS)
    assert found.stats.num_output_tokens == 60


def formula(acceptance: float, ratio: float, window: int) -> float:
    """The paper's tokens per second, with a draft step of 1 ms."""
    steps = (1 - acceptance) * (1 + acceptance / (1 - acceptance**window)) if acceptance < 1 else 1 / window
    return 1 / (steps * max(window, ratio) * MS)


@pytest.mark.parametrize(
    ("acceptance", "ratio", "window"),
    [
        (acceptance, ratio, window)
        for acceptance, (ratio, window) in itertools.product(
            (0.0, 0.3, 0.6, 0.9, 1.0), ((2, 2), (4, 2), (4, 4), (8, 4), (8, 8))
        )
    ],
)
def test_speed_is_the_formula_s(acceptance: float, ratio: int, window: int) -> None:
    """With max(window, ratio) draft steps a target step, as long as the target is the slower one."""
    found = run(acceptance, ratio, window, tokens=200)
    assert 200 / found.seconds == pytest.approx(formula(acceptance, ratio, window), rel=0.1)


def test_a_drafter_that_has_more_guesses_drafts_a_chain_still() -> None:
    alone, more = (Costs(acceptance=each, target=(8 * MS,), draft=(MS,)) for each in ((0.6,), (0.6, 0.3)))
    shape = TreeShape(num_speculative_tokens=16, width=4, children=2)
    first, second = (simulate(each, "pearl", shape=shape, tokens=200) for each in (alone, more))
    assert second.seconds == pytest.approx(first.seconds, rel=0.1)


@pytest.mark.parametrize(("acceptance", "ratio", "window"), [(0.6, 4, 8), (0.9, 4, 6)])
def test_windows_that_take_longer_than_the_target_end_with_a_rejection(
    acceptance: float, ratio: int, window: int
) -> None:
    """The paper drafts a window to its end even if it was rejected: here, only accepted ones take so long."""
    bare, whole = 1 / acceptance, 1 / (1 - acceptance**window)
    steps = bare * ratio + whole * window
    tokens = 1 / acceptance + 1 / (1 - acceptance)
    speed = TOKENS / run(acceptance, ratio, window).seconds
    assert speed == pytest.approx(tokens / (steps * MS), rel=0.1)
    assert speed > 1.05 * formula(acceptance, ratio, window)


@pytest.mark.parametrize("ratio", [1 / 3, 4])
def test_a_miss_costs_one_step(ratio: float) -> None:
    """Also with a drafter three times slower than the target."""
    found = run(0.0, ratio, 4, tokens=50)
    assert found.stats.target_steps == 50
    assert found.seconds == pytest.approx(50 * ratio * MS)


def test_before_a_window_the_bare_root_is_verified_at_once() -> None:
    made, draft = pipeline(), Draft(0)
    assert made.phase(draft) is Phase.PRE_VERIFY
    assert made.decide(draft, 0.0) == Verify(0)
    assert draft.steps_after_commit == 4


def test_a_window_is_waited_for_and_verified_but_for_its_first_token() -> None:
    made, draft = pipeline(), Draft(2)
    assert made.phase(draft) is Phase.POST_VERIFY
    assert isinstance(made.decide(draft, 0.0), Wait)
    draft.tree.add([1], [7], [0.9])
    assert made.decide(draft, 0.01) == Verify(3)


def test_a_drafter_that_has_finished_is_gone_or_is_late_is_not_waited_for() -> None:
    for change in ("ended", "reachable"):
        made, draft = pipeline(), Draft(1)
        if change == "ended":
            draft.round.ended = 0.0
        else:
            draft.reachable = False
        assert made.decide(draft, 0.0) == Verify(3)
    made, draft = pipeline(), Draft(1)
    waiting = made.decide(draft, 0.0)
    assert isinstance(waiting, Wait)
    assert isinstance(made.decide(draft, waiting.until), Verify)
    draft.round = Round(began=1.0, allowed=4)
    assert isinstance(made.decide(draft, 1.0), Verify)


def test_the_window_is_how_much_slower_the_target_is() -> None:
    made, draft = pipeline(None), Draft(0)
    assert made.window(draft) == FIRST_WINDOW
    for seconds, window in ((2 * MS, 4), (100 * MS, LEAST_WINDOW), (0.1 * MS, 16)):
        draft.times = GrowthTimes(LinkPace(), 0.0)
        draft.times.pace.observe_interval(seconds)
        assert made.window(draft) == window
