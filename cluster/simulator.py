"""Speed-ups of the pipelines in simulated time: the real state machines over a model of costs.

The target's true token at a position is a drawn *rank*: rank r is the drafter's r-th guess
there with the given chance, otherwise none of its guesses. So acceptance by rank, the cost
curve of the target, the draft step and the round trip are all there is to say, and nothing of
engine, protocol or pipeline is imitated.
"""

from collections.abc import Sequence
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
from outrider.speculation.pipelines.registry import PIPELINES
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.replication.messages import (
    NO_LIMIT,
    PROTOCOL_VERSION,
    GrowthLimits,
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


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What is simulated; times in seconds.

    acceptance: chance that the target's token is the drafter's first, second, ... guess,
        where it has made any.
    target: ``[R]``, a target step of 1, 2, ... R rows. draft: one draft step.
    round_trip: of the link.

    Raises:
        InvalidConfigError: chances do not fit, or a time is not positive.
    """

    acceptance: tuple[float, ...]
    target: tuple[float, ...]
    draft: float
    round_trip: float = 0.0

    def __post_init__(self) -> None:
        chances = np.array(self.acceptance)
        if not len(chances) or chances.min() < 0 or chances.sum() > 1 + 1e-9:
            raise InvalidConfigError(f"acceptance by rank {list(self.acceptance)} is no list of chances")
        if len(self.target) < 2 or min(self.target) <= 0 or (np.diff(self.target) < 0).any():
            raise InvalidConfigError(f"target times {list(self.target)} must be positive and not decrease")
        if self.draft <= 0 or self.round_trip < 0:
            raise InvalidConfigError(f"draft {self.draft} and round trip {self.round_trip} are not possible")


def straight_curve(one_row: float, slope: float, rows: int) -> tuple[float, ...]:
    """A target step of 1 ... ``rows`` rows, of which each adds ``slope`` times the first."""
    return tuple(one_row * (1 + slope * extra) for extra in range(rows))


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """seconds: of the world, from the prompt's end to the last token."""

    tokens: int
    seconds: float
    stats: SpeculationStatistics = field(repr=False)


def simulate(
    costs: Costs, pipeline: str | None, *, shape: TreeShape, tokens: int, seed: int = 0
) -> Simulated:
    """One request of so many tokens; ``pipeline`` None is plain decoding.

    Raises:
        InvalidConfigError: the pipeline is unknown.
    """
    world = VirtualClock()
    truth = _ranks(costs.acceptance, tokens + 2, seed)
    vocab_size = len(costs.acceptance) + 1
    runner = _Runner(world, truth, vocab_size, costs.target)
    pool = None
    if pipeline is not None:
        if pipeline not in PIPELINES:
            raise InvalidConfigError(f"pipeline must be one of {', '.join(PIPELINES)}, not {pipeline!r}")
        steps = NO_LIMIT if pipeline == "parallel" else shape.depth
        pool = _pool(world, costs, shape, vocab_size, steps=steps)
        pool.wait_for_workers(2 * costs.round_trip)
    engine = TargetEngine(
        TargetModel(runner=runner, vocab_size=vocab_size, eos_ids=(), detokenizer=lambda _: _NoText()),
        verifier=make_verifier("coupled"),
        drafting=pool,
        remote=pool,
        shape=shape,
        make_pipeline=PIPELINES[pipeline or "parallel"],
        clock=world,
    )
    engine.costs = CostEstimates(StepCostModel(costs.target))
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, seed=seed)
    with engine.start(Request(prompt_ids=np.zeros(1, np.int64), params=params)) as run:
        began = world.now
        while not run.finished:
            run.step()
    return Simulated(tokens=run.stats.num_output_tokens, seconds=world.now - began, stats=run.stats)


def _ranks(acceptance: Sequence[float], count: int, seed: int) -> IntArray:
    """The true token at each position: a rank, or the number of ranks for a miss."""
    chances = np.append(acceptance, max(0.0, 1 - sum(acceptance)))
    return np.random.default_rng(seed).choice(len(chances), count, p=chances / chances.sum())


def _pool(world: VirtualClock, costs: Costs, shape: TreeShape, vocab_size: int, *, steps: int) -> DraftPool:
    busy = BusyTime(world)
    worker = VirtualWorker(world, DraftWorker(_RankDrafter(costs, busy), clock=busy), busy)
    hello = Hello(
        protocol_version=PROTOCOL_VERSION, model="simulated", vocab_hash="", vocab_size=vocab_size,
        eos_ids=(), numerics="canonical",
    )  # fmt: skip
    welcome = Welcome(
        protocol_version=PROTOCOL_VERSION, name="simulated", model="simulated", vocab_hash="",
        vocab_size=vocab_size, numerics="canonical", max_model_len=CONTEXT, max_sessions=1,
    )  # fmt: skip
    link = VirtualLink(world, worker, hello=hello, welcome=welcome, delay=costs.round_trip / 2)
    limits = GrowthLimits(width=shape.width, children=shape.children, steps=steps, min_score=shape.min_score)
    arrivals = VirtualArrivals(world, [link])
    return DraftPool([link], arrivals, limits=limits, vocab_size=vocab_size, clock=world)


class _NoText:
    """No text is made of simulated tokens."""

    def push(self, ids: Sequence[int]) -> str:  # noqa: ARG002
        return ""

    def flush(self) -> str:
        return ""


class _Length:
    """All that a simulated sequence keeps."""

    def __init__(self) -> None:
        self.length = 0

    def close(self) -> None:
        """Nothing to free."""


class _Runner:
    """A target whose step takes its time and whose tokens are given in advance."""

    max_model_len = CONTEXT

    def __init__(self, world: VirtualClock, truth: IntArray, vocab_size: int, times: Sequence[float]) -> None:
        self._world, self._times = world, times
        self._rows = torch.from_numpy(np.eye(vocab_size, dtype=np.float32)[truth])

    def open(self, max_tokens: int) -> _Length:  # noqa: ARG002
        return _Length()

    def prefill(self, sequence: _Length, tokens: IntArray) -> None:
        sequence.length += len(tokens)

    def verify(self, queries: Sequence[TreeQuery[_Length]]) -> list[torch.Tensor]:
        (query,) = queries
        query.sequence.length += 1
        depths = np.concatenate((np.zeros(1, np.int64), query.tree.depths))
        self._world.advance(self._times[min(len(depths), len(self._times)) - 1])
        return [self._rows[np.minimum(query.sequence.length - 1 + depths, len(self._rows) - 1)]]

    def accept(self, sequence: _Length, nodes: IntArray) -> None:
        sequence.length += len(nodes)


class _RankSession:
    """A drafter's tree; there is no text to know."""

    def __init__(self) -> None:
        self.tree = LivingTree(Law.COUPLED)
        self.root_rows = 1

    def commit(self, tokens: IntArray) -> Reroot:
        reroot = self.tree.reroot(tokens)
        self.root_rows = int(self.tree.frontier(1).tolist() == [ROOT])
        return reroot

    def close(self) -> None:
        """Nothing to free."""


class _RankDrafter:
    """Gives every node the same children: the ranks, with their chances."""

    max_rows = 64

    def __init__(self, costs: Costs, busy: BusyTime) -> None:
        self._chances: FloatArray = np.array(costs.acceptance)
        self._seconds, self._busy = costs.draft, busy

    def open_session(self, *_: object, **__: object) -> _RankSession:
        return _RankSession()

    def grow(self, plan: Sequence[tuple[_RankSession, IntArray]]) -> None:
        self._busy.spend(self._seconds)
        for session, slots in plan:
            session.root_rows = 0
            tree = session.tree
            tree.mark_expanded(slots)
            children = len(self._chances)
            tree.add(np.repeat(slots, children), np.tile(np.arange(children), len(slots)),
                     np.tile(self._chances, len(slots)))  # fmt: skip
