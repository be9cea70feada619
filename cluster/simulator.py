"""The pipelines in simulated time: the real state machines over a model of costs.

The target's true token at a position is a drawn *rank*: rank r is the drafter's r-th guess
there with the given chance, otherwise none of its guesses. So acceptance by rank and the times
of ``Costs`` are all there is to say, and nothing of engine, protocol or pipeline is imitated.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from outrider.actors.draft_pool import DraftPool
from outrider.actors.draft_worker import DraftWorker
from outrider.actors.runner import TreeQuery
from outrider.actors.target_engine import TargetEngine, TargetModel
from outrider.actors.virtual import BusyTime, VirtualArrivals, VirtualClock, VirtualLink, VirtualWorker
from outrider.speculation.errors import InvalidConfigError
from outrider.speculation.living_tree import LivingTree, Reroot
from outrider.speculation.pipelines.costs import CostEstimates
from outrider.speculation.pipelines.linger import LingerRule
from outrider.speculation.pipelines.registry import PIPELINES, growth_limits
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.replication.messages import (
    PROTOCOL_VERSION,
    Hello,
    Welcome,
)
from outrider.speculation.request import Request
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.statistics import SpeculationStatistics
from outrider.speculation.step_cost import StepCostModel
from outrider.speculation.tree import ROOT, Law
from outrider.speculation.types import FloatArray, IntArray
from outrider.speculation.verifiers.registry import make_verifier

CONTEXT = 1 << 20
MAX_TOKENS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What is simulated; times in seconds.

    acceptance: chance that the target's token is the drafter's first, second, ... guess,
        where it has made any.
    target: ``[R]``, a target step of 1, 2, ... R rows; more rows follow the mean slope.
    draft: ``[W]``, a draft step that expands 1, 2, ... W nodes; more cost as much as W.
    round_trip: of the link, with all that a message takes from one engine to the other.
    target_overhead: of each target step beside its forward, plain decoding included.
    speculation_overhead: the same, of each step with a drafter that has not been stopped.
    commit_overhead: of the drafter for each commit that it takes in.
    contrast: how much easy positions differ from hard ones, half of all: the chance of anything
        but the first guess is so much smaller, or larger, there. The drafter knows which is which.
    correlation: of neighbouring positions' difficulty.

    Raises:
        InvalidConfigError: a value is not possible.
    """

    acceptance: tuple[float, ...]
    target: tuple[float, ...]
    draft: tuple[float, ...]
    round_trip: float = 0.0
    target_overhead: float = 0.0
    speculation_overhead: float = 0.0
    commit_overhead: float = 0.0
    contrast: float = 0.0
    correlation: float = 0.0

    def __post_init__(self) -> None:
        chances = np.array(self.acceptance)
        if not len(chances) or not chances.min() >= 0 or not chances.sum() <= 1 + 1e-9:
            raise InvalidConfigError(
                f"acceptance must be chances whose sum is at most 1, not {list(self.acceptance)}"
            )
        for name in ("target", "draft"):
            times = np.array(getattr(self, name))
            if not len(times) or not (
                np.isfinite(times).all() and times[0] > 0 and (np.diff(times) >= 0).all()
            ):
                raise InvalidConfigError(
                    f"{name} times must be positive and not decrease, not {times.tolist()}"
                )
        for name in ("round_trip", "target_overhead", "speculation_overhead", "commit_overhead"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidConfigError(f"{name} must be at least 0 seconds, not {getattr(self, name)}")
        if not 0 <= self.contrast <= 1 or (1 + self.contrast) * (1 - chances[0]) > 1 + 1e-9:
            raise InvalidConfigError(
                f"contrast must be from 0 to 1 and leave the first guess a chance, not {self.contrast}"
            )
        if not 0 <= self.correlation < 1:
            raise InvalidConfigError(f"correlation must be from 0 to below 1, not {self.correlation}")


def straight_curve(one_row: float, slope: float, rows: int) -> tuple[float, ...]:
    """A target step of 1 ... ``rows`` rows, of which each adds ``slope`` times the first."""
    return tuple(one_row * (1 + slope * extra) for extra in range(rows))


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """seconds: of the world, from the prompt's end to the last token."""

    tokens: int
    seconds: float
    stats: SpeculationStatistics = field(repr=False)

    @property
    def bubbles(self) -> float:
        """Share of the time in which no forward of the target runs."""
        return 1 - self.stats.target_seconds / self.seconds


def simulate(
    costs: Costs,
    pipeline: str | None,
    *,
    shape: TreeShape,
    tokens: int,
    seed: int = 0,
    text: "Text | None" = None,
    linger: LingerRule | None = None,
) -> Simulated:
    """One request of so many tokens; ``pipeline`` None is plain decoding.

    text: a measured one, in place of one drawn from the costs' acceptance. linger: of ``parallel``.

    Raises:
        InvalidConfigError: the pipeline is unknown, or so many tokens cannot be simulated.
        InvalidRequestError: the seed is out of range.
    """
    if pipeline is not None and pipeline not in PIPELINES:
        raise InvalidConfigError(f"pipeline must be one of {', '.join(PIPELINES)}, not {pipeline!r}")
    if not 1 <= tokens <= MAX_TOKENS:
        raise InvalidConfigError(f"tokens must be from 1 to {MAX_TOKENS}, not {tokens}")
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, seed=seed)
    world = VirtualClock()
    text = text or draw_text(costs, tokens, seed)
    step_cost = StepCostModel(costs.target)
    runner = _Runner(world, text, step_cost.curve(shape.num_speculative_tokens + 1), costs)
    pool = None
    if pipeline is not None:
        pool = _pool(world, costs, text, shape, pipeline)
        world.advance(costs.round_trip)
        pool.poll()
    engine = TargetEngine(
        TargetModel(runner=runner, vocab_size=text.vocab_size, eos_ids=(), detokenizer=lambda _: _NoText()),
        verifier=make_verifier("coupled"),
        drafting=pool,
        remote=pool,
        shape=shape,
        make_pipeline=PIPELINES[pipeline or "parallel"],
        costs=CostEstimates(step_cost, linger=linger),
        clock=world,
    )
    runner.is_helped = lambda: engine.drafted
    with engine.start(Request(prompt_ids=np.zeros(1, np.int64), params=params)) as run:
        began = world.now
        while not run.finished:
            run.step()
    return Simulated(tokens=run.stats.num_output_tokens, seconds=world.now - began, stats=run.stats)


@dataclass(frozen=True)
class Text:
    """A text to generate.

    truth: int ``[count]``, at each position the rank of the target's token among the
        drafter's guesses, or their number where it is none of them.
    chances: float ``[count, ranks]``, of the guesses, as the drafter believes them.
    """

    truth: IntArray
    chances: FloatArray

    @property
    def vocab_size(self) -> int:
        """Ranks, and one for a miss."""
        return int(self.chances.shape[1]) + 1

    def chances_at(self, positions: IntArray) -> FloatArray:
        """``[k, ranks]``; drafters look beyond the end."""
        return self.chances[np.minimum(positions, len(self.chances) - 1)]


def draw_text(costs: Costs, count: int, seed: int) -> Text:
    """Positions easy and hard, and the target's tokens at them."""
    rng = np.random.default_rng(seed)
    flips = rng.random(count) < (1 - costs.correlation) / 2
    hard = (np.cumsum(flips) + rng.integers(2)) % 2
    # Without contrast the two kinds are one, and are drawn together.
    kinds = hard if costs.contrast else np.zeros(count, np.int64)
    truth = np.zeros(count, np.int64)
    chances = np.zeros((count, len(costs.acceptance)))
    for kind, scale in enumerate((1 - costs.contrast, 1 + costs.contrast)):
        of_kind = np.flatnonzero(kinds == kind)
        guesses = scale * np.array(costs.acceptance)
        guesses[0] = min(1.0, max(0.0, 1 - scale * (1 - costs.acceptance[0])))
        truth[of_kind] = _ranks(guesses, len(of_kind), rng)
        chances[of_kind] = guesses
    return Text(truth, chances)


def _ranks(chances: FloatArray, count: int, rng: np.random.Generator) -> IntArray:
    """Every rank as often as its chance says, in random order.

    Evenly spread draws: with independent ones the share of misses in a text of some hundred
    tokens would differ more between seeds than pipelines differ.
    """
    bounds = np.cumsum(chances)
    draws = rng.permutation((np.arange(count) + rng.random(count)) / max(count, 1))
    # Rounding must not make a miss where the chances add up to one.
    bounds[-1] = 1.0 if bounds[-1] > 1 - 1e-9 else bounds[-1]
    return np.searchsorted(bounds, draws, side="right")


def _pool(world: VirtualClock, costs: Costs, text: Text, shape: TreeShape, pipeline: str) -> DraftPool:
    busy, vocab_size = BusyTime(world), text.vocab_size
    worker = VirtualWorker(world, DraftWorker(_RankDrafter(costs, text, busy), clock=busy), busy)
    hello = Hello(
        protocol_version=PROTOCOL_VERSION, model="simulated", vocab_hash="", vocab_size=vocab_size,
        eos_ids=(), numerics="canonical",
    )  # fmt: skip
    welcome = Welcome(
        protocol_version=PROTOCOL_VERSION, name="simulated", model="simulated", vocab_hash="",
        vocab_size=vocab_size, numerics="canonical", max_model_len=CONTEXT, max_sessions=1,
    )  # fmt: skip
    link = VirtualLink(world, worker, hello=hello, welcome=welcome, delay=costs.round_trip / 2)
    arrivals = VirtualArrivals(world, [link])
    return DraftPool(
        [link], arrivals, limits=lambda _: growth_limits(pipeline, shape), vocab_size=vocab_size, clock=world
    )


class _NoText:
    """No text is made of simulated tokens."""

    def push(self, ids: Sequence[int]) -> str:  # noqa: ARG002
        return ""

    def flush(self) -> str:
        return ""


class _Length:
    """All that a simulated sequence keeps."""

    room = CONTEXT

    def __init__(self) -> None:
        self.length = 0

    def reserve(self, positions: int) -> bool:
        return positions <= self.room

    def publish(self, tokens: IntArray) -> None:
        """Nobody else is served."""

    def close(self) -> None:
        """Nothing to free."""


class _Runner:
    """A target whose step takes its time and whose tokens are given in advance.

    is_helped: whether the step was one with drafts.
    """

    max_model_len = CONTEXT

    def __init__(self, world: VirtualClock, text: Text, times: FloatArray, costs: Costs) -> None:
        self._world, self._times, self._costs = world, times.tolist(), costs
        self.is_helped: Callable[[], bool] = lambda: False
        self._rows = torch.from_numpy(np.eye(text.vocab_size, dtype=np.float32)[text.truth])

    def open(self, text: IntArray, like: object = None, reusable: int | None = None) -> _Length:  # noqa: ARG002
        return _Length()

    def verify(self, queries: Sequence[TreeQuery[_Length]]) -> list[torch.Tensor]:
        (query,) = queries
        assert query.tree is not None, "the prompt is one token"
        query.sequence.length += 1
        depths = np.concatenate((np.zeros(1, np.int64), query.tree.depths))
        self._world.advance(self._times[len(depths) - 1])
        return [self._rows[np.minimum(query.sequence.length - 1 + depths, len(self._rows) - 1)]]

    def accept(self, sequence: _Length, nodes: IntArray) -> None:
        sequence.length += len(nodes)
        helped = self._costs.speculation_overhead if self.is_helped() else 0.0
        self._world.advance(self._costs.target_overhead + helped)


class _RankSession:
    """A drafter's tree, and how much text there is before it."""

    def __init__(self, length: int, children: int, commit_seconds: float, busy: BusyTime) -> None:
        self.tree, self.children = LivingTree(Law.COUPLED), children
        self.root_rows = 1
        self.length = length
        self._commit_seconds, self._busy = commit_seconds, busy

    def commit(self, tokens: IntArray) -> Reroot:
        self._busy.spend(self._commit_seconds)
        self.length += len(tokens)
        reroot = self.tree.reroot(tokens)
        self.root_rows = int(self.tree.frontier(1).tolist() == [ROOT])
        return reroot

    def close(self) -> None:
        """Nothing to free."""


class _RankDrafter:
    """Gives every node the first ranks as children, with the chances of its position."""

    max_rows = 64

    def __init__(self, costs: Costs, text: Text, busy: BusyTime) -> None:
        self._costs, self._text, self._busy = costs, text, busy

    def open_session(self, token_ids: IntArray, *_: object, children: int, **__: object) -> _RankSession:
        return _RankSession(len(token_ids), children, self._costs.commit_overhead, self._busy)

    def grow(self, plan: Sequence[tuple[_RankSession, IntArray]]) -> None:
        times = self._costs.draft
        self._busy.spend(times[min(sum(len(slots) for _, slots in plan), len(times)) - 1])
        for session, slots in plan:
            session.root_rows = 0
            tree = session.tree
            # The text begins behind a prompt of one token.
            positions = session.length - 1 + tree.depths[slots]
            chances = self._text.chances_at(positions)[:, : session.children]
            tree.mark_expanded(slots)
            ranks = np.tile(np.arange(chances.shape[1]), len(slots))
            tree.add(np.repeat(slots, chances.shape[1]), ranks, chances.ravel())
