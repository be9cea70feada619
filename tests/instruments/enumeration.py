"""EnumeratingRNG: the exact law of a random program, by running it once per outcome of its draws."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from instruments.table_lm import TableLM
from outrider.actors import request_run, target_engine
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.types import FloatArray, IntArray

Tokens = tuple[int, ...]
Law = dict[Tokens, float]


class EnumeratingRNG:
    """Answers draws along one branch after another, depth first; ``weight`` is the branch's."""

    def __init__(self) -> None:
        self._branch: list[tuple[int, int]] = []
        self._drawn = 0
        self.weight = 1.0

    def choose(self, weights: Sequence[float]) -> int:
        """An index; every one with positive weight is visited in some run."""
        possible = [index for index, weight in enumerate(weights) if weight > 0.0]
        if self._drawn == len(self._branch):
            self._branch.append((0, len(possible)))
        chosen, count = self._branch[self._drawn]
        assert count == len(possible), "the program is not a function of its draws"
        self._drawn += 1
        self.weight *= weights[possible[chosen]]
        return possible[chosen]

    def next_branch(self) -> bool:
        """Moves on; False when all have been visited."""
        assert self._drawn == len(self._branch), "the program stopped before its draws"
        while self._branch and self._branch[-1][0] + 1 == self._branch[-1][1]:
            self._branch.pop()
        if not self._branch:
            return False
        chosen, count = self._branch.pop()
        self._branch.append((chosen + 1, count))
        self._drawn, self.weight = 0, 1.0
        return True


class SharedNoise:
    """One uniform per position, known only as finely as it has been asked for.

    Every row at a position inverts its own distribution with the same uniform, so a path has
    one draw per position, however often it is verified, and a draft model can couple to it.
    Positions from ``horizon`` on cannot show in the output; they take their likeliest token.
    """

    def __init__(self, rng: EnumeratingRNG, horizon: int) -> None:
        self._rng, self._horizon = rng, horizon
        self._known: dict[int, tuple[float, float]] = {}

    def choose(self, logits: torch.Tensor, positions: IntArray) -> IntArray:
        """In place of ``TokenChooser.choose``."""
        edges = logits.double().softmax(dim=1).cumsum(dim=1).numpy()
        tokens: IntArray = logits.argmax(dim=1).numpy()
        for position in np.unique(positions).tolist():
            if position < self._horizon:
                rows = np.flatnonzero(positions == position)
                uniform = self._refined(position, edges[rows])
                tokens[rows] = (edges[rows, :-1] <= uniform).sum(axis=1)
        return tokens

    def _refined(self, position: int, edges: FloatArray) -> float:
        low, high = self._known.get(position, (0.0, 1.0))
        inside = edges[(edges > low) & (edges < high)]
        cuts = np.unique(np.concatenate(([low, high], inside)))
        part = self._rng.choose((np.diff(cuts) / (high - low)).tolist())
        self._known[position] = float(cuts[part]), float(cuts[part + 1])
        return float(cuts[part] + cuts[part + 1]) / 2


Program = Callable[[SharedNoise], Sequence[int]]
"""Serves one request whose engine draws from the noise; its output."""


def exact_law(program: Program, *, horizon: int) -> Law:
    """The law of a program's output. ``horizon``: the position after the last token that counts."""
    law: Law = defaultdict(float)
    rng = EnumeratingRNG()
    while True:
        noise = SharedNoise(rng, horizon)
        with drawing_from(noise):
            output = tuple(program(noise))
        law[output] += rng.weight
        if not rng.next_branch():
            return dict(law)


@contextmanager
def drawing_from(noise: SharedNoise) -> Iterator[None]:
    """Engines that start requests here choose their tokens with ``noise``."""

    def make_chooser(params: SamplingParams, choice: int = 0) -> SharedNoise:  # noqa: ARG001
        return noise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request_run, "TokenChooser", make_chooser)
        patch.setattr(target_engine, "choose_together", each_by_itself)
        yield


def each_by_itself(
    choosers: Sequence[SharedNoise], logits: torch.Tensor, positions: Sequence[IntArray]
) -> list[IntArray]:
    """In place of ``choose_together``."""
    rows = torch.split(logits, [len(each) for each in positions])
    return [noise.choose(own, each) for noise, own, each in zip(choosers, rows, positions, strict=True)]


def distance(left: Law, right: Law) -> float:
    """The largest difference of a probability."""
    return max(abs(left.get(each, 0.0) - right.get(each, 0.0)) for each in left.keys() | right.keys())


def coupled_guess(draft: TableLM, noise: SharedNoise, text: list[int]) -> int:
    """A draft model's token with the engine's own noise."""
    row = torch.from_numpy(draft.row(text)[None])
    return int(noise.choose(row, np.array([len(text)]))[0])
