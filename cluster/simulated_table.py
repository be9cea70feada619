"""Speed-ups over plain decoding, averaged over seeds, and the table of them that people compare with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from outrider.cluster.simulator import Costs, Simulated, simulate, straight_curve
from outrider.speculation.pipelines.linger import FIRST_KAPPA, KAPPAS, NEVER, LingerRule
from outrider.speculation.pipelines.shape import MAX_VERIFIED_NODES, TreeShape
from outrider.speculation.tree import MAX_TREE_DEPTH

ACCEPTANCES = ((0.65, 0.14, 0.06, 0.03, 0.02), (0.79, 0.14, 0.04, 0.01))
RATIOS = ((4.0, 0.0), (8.0, 0.0), (8.0, 4.0), (35.0, 0.0), (35.0, 28.0))
"""Of a target step of one row, and of the round trip, to a draft step."""
SLOPE = 0.15 / 16
"""What a row adds to a target step, as a share of a step of one row."""
DRAFT_SECONDS = 1e-3
"""Nothing but patience, which is in seconds, depends on it."""
SHAPES = ((4, 32), (8, 48), (16, 63))
"""Tree widths and most verified nodes that are tried."""
POLICIES: dict[str, tuple[str, tuple[float, ...]]] = {
    "never wait": ("parallel", (NEVER,)),
    "linger": ("parallel", (FIRST_KAPPA,)),
    "parallel": ("parallel", KAPPAS),
    "serial": ("serial", KAPPAS),
    "pearl": ("pearl", KAPPAS),
}
"""Columns: a pipeline, and the kappas of its lingering. ``parallel`` chooses among them, as in an engine."""
SCREENING_TOKENS = 250
SEEDS = 4


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Runs of several seeds, and their speed-up over plain decoding, with its standard error."""

    speed_up: float
    error: float
    runs: tuple[Simulated, ...]
    shape: TreeShape


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of the table. pearl: by formula, None where the link takes time."""

    acceptance: tuple[float, ...]
    target: float
    round_trip: float
    policies: dict[str, Estimate]
    pearl: float | None


def estimate(
    costs: Costs,
    pipeline: str | None,
    *,
    shape: TreeShape,
    tokens: int,
    seed: int,
    kappas: Sequence[float] = KAPPAS,
) -> Estimate:
    """``SEEDS`` runs of so many tokens each, none of which knows anything of the others.

    kappas: what the lingering of ``parallel`` chooses from.

    Raises:
        InvalidConfigError: see ``simulate``.
    """
    runs = []
    for index in range(SEEDS):
        linger = LingerRule(kappas, FIRST_KAPPA if FIRST_KAPPA in kappas else kappas[0])
        runs.append(simulate(costs, pipeline, shape=shape, tokens=tokens, seed=seed + index, linger=linger))
    plain = costs.target[0] + costs.target_overhead
    ratios = np.array([run.tokens * plain / run.seconds for run in runs])
    return Estimate(
        speed_up=float(ratios.mean()),
        error=float(ratios.std(ddof=1) / SEEDS**0.5),
        runs=tuple(runs),
        shape=shape,
    )


def best_shape(costs: Costs, pipeline: str, *, shapes: Sequence[TreeShape], seed: int) -> TreeShape:
    """The fastest of some shapes, with another seed than those that count."""
    times = [
        simulate(costs, pipeline, shape=shape, tokens=SCREENING_TOKENS, seed=seed + SEEDS).seconds
        for shape in shapes
    ]
    return shapes[int(np.argmin(times))]


def table(*, tokens: int, seed: int, progress: Callable[[float], None]) -> Iterator[Cell]:
    """Every row; ``progress`` is told how many cells are done."""
    done = 0
    for acceptance in ACCEPTANCES:
        for ratio, trip in RATIOS:
            cell = Cell(
                acceptance=acceptance,
                target=ratio,
                round_trip=trip,
                policies={},
                pearl=None if trip else pearl_speed_up(acceptance[0], ratio),
            )
            shapes: dict[str, TreeShape] = {}
            for policy in POLICIES:
                estimate = table_estimate(acceptance, ratio, trip, policy, tokens, seed, shapes)
                cell.policies[policy] = estimate
                done += 1
                progress(done)
            yield cell


def table_estimate(
    acceptance: tuple[float, ...],
    ratio: float,
    trip: float,
    policy: str,
    tokens: int,
    seed: int,
    chosen: dict[str, TreeShape],
) -> Estimate:
    """One figure of the table. chosen: the pipelines' shapes in this row, found here if they are missing."""
    costs = Costs(
        acceptance=acceptance,
        target=straight_curve(ratio * DRAFT_SECONDS, SLOPE, MAX_VERIFIED_NODES + 1),
        draft=(DRAFT_SECONDS,),
        round_trip=trip * DRAFT_SECONDS,
    )
    pipeline, kappas = POLICIES[policy]
    if pipeline not in chosen:
        # A chain has no width, and its window is found by itself.
        possible = SHAPES[-1:] if pipeline == "pearl" else SHAPES
        shapes = [
            TreeShape(
                num_speculative_tokens=nodes, width=width, children=len(acceptance), depth=MAX_TREE_DEPTH
            )
            for width, nodes in possible
        ]
        chosen[pipeline] = (
            best_shape(costs, pipeline, shapes=shapes, seed=seed) if len(shapes) > 1 else shapes[0]
        )
    return estimate(costs, pipeline, shape=chosen[pipeline], tokens=tokens, seed=seed, kappas=kappas)


def pearl_speed_up(acceptance: float, ratio: float) -> float:
    """PEARL's with its best window, by formula (Liu et al., "PEARL", 2024).

    acceptance: of a draft token. ratio: of a target step to a draft step.

    A window of g tokens is drafted while the target verifies, in ``max(g, ratio)`` draft steps.
    After a rejection the next step verifies one token ahead of its window and yields one token;
    after an acceptance it verifies a window and yields up to g. On average a step yields
    ``1 / ((1 - a) (1 + a / (1 - a**g)))`` tokens.
    """
    if acceptance >= 1.0:
        return ratio
    windows = np.arange(1, max(2, 4 * int(np.ceil(ratio))))
    tokens = 1 / ((1 - acceptance) * (1 + acceptance / (1 - acceptance**windows)))
    return float((tokens * ratio / np.maximum(windows, ratio)).max())
