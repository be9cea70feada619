"""The law of coupled decoding over many seeds: the noise's real bits, no engine around them."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from instruments.checks import paths_of
from instruments.drafters import make_tree
from instruments.table_lm import TableLM
from outrider.kernels.gumbel import exponential_noise, stream_keys
from outrider.speculation import sampling
from outrider.speculation.tree import ROOT, DraftTree
from outrider.speculation.types import FloatArray
from outrider.speculation.verifiers.coupled import CoupledVerifier

SEEDS = 12_000
COUNT = 3
PROMPT = [1, 2]
SHAPES: dict[str, tuple[int, ...]] = {"chain 1": (1,), "chain 2": (1, 1), "chain 4": (1,) * 4, "tree": (2, 2)}
"""Children per node, level by level."""
FALSE_ALARM = 0.001


def total_variation_of(children: Sequence[int], seeds: int = SEEDS) -> tuple[float, float]:
    """Total variation between sampled and exact law of three tokens, and what pure chance allows.

    The second number is the 99.9 % quantile of 4,000 simulated samples of the exact law, so a
    right engine fails for one in a thousand choices of seeds; these are fixed.
    """
    target = TableLM.random(1, vocab_size=3, order=2)
    law = target.joint_law(PROMPT, COUNT)
    exact = np.array(list(law.values()))
    outputs = sampled_outputs(target, TableLM.random(2, vocab_size=3), children, seeds)
    index = {text: i for i, text in enumerate(law)}
    counts = np.bincount([index[text] for text in outputs], minlength=len(law))
    null = np.random.default_rng(5).multinomial(seeds, exact, size=4000) / seeds
    band = np.quantile(np.abs(null - exact).sum(axis=1) / 2, 1 - FALSE_ALARM)
    return float(np.abs(counts / seeds - exact).sum() / 2), float(band)


def sampled_outputs(
    target: TableLM, draft: TableLM, children: Sequence[int], seeds: int
) -> list[tuple[int, ...]]:
    """The first three tokens of every seed, drafted with the same noise and verified."""
    noise = noise_of(seeds, COUNT + len(children) + 1, target.vocab_size)
    verifier = CoupledVerifier()

    @cache
    def laws(lm: TableLM, text: tuple[int, ...]) -> FloatArray:
        return lm.law(list(text))

    @cache
    def tree_and_laws(
        text: tuple[int, ...], paths: tuple[tuple[int, ...], ...]
    ) -> tuple[DraftTree, FloatArray]:
        parents = [paths.index(path[:-1]) if path[:-1] else ROOT for path in paths]
        tree = make_tree([path[-1] for path in paths], parents)
        assert tuple(paths_of(tree)) == paths
        return tree, np.stack([laws(target, text), *(laws(target, text + path) for path in paths)])

    def serve(own: FloatArray) -> tuple[int, ...]:
        text = tuple(PROMPT)
        while len(text) < len(PROMPT) + COUNT:
            paths: list[tuple[int, ...]] = []
            level: list[tuple[int, ...]] = [()]
            for depth, width in enumerate(children):
                races = [own[len(text) + depth - len(PROMPT)] / laws(draft, text + path) for path in level]
                level = [
                    (*path, int(token))
                    for path, race in zip(level, races, strict=True)
                    for token in race.argsort()[:width]
                ]
                paths += level
            tree, probs = tree_and_laws(text, tuple(paths))
            # Through the module, so that a mutation of it shows here.
            positions = sampling.row_positions(len(text), tree)
            chosen = (own[positions - len(PROMPT)] / probs).argmin(axis=1)
            verdict = verifier.verify(tree, chosen)
            text += (*tree.tokens[verdict.accepted].tolist(), verdict.token)
        return text[len(PROMPT) : len(PROMPT) + COUNT]

    return [serve(own) for own in noise]


def noise_of(seeds: int, positions: int, vocab_size: int) -> npt.NDArray[np.float64]:
    """Unit exponentials ``[seeds, positions, V]``, from the prompt's end on."""
    every = np.repeat(np.arange(seeds), positions)
    where = np.tile(len(PROMPT) + np.arange(positions), seeds)
    base, gamma = torch.from_numpy(stream_keys(every, where, 0))
    noise = exponential_noise(base, gamma, vocab_size)
    return noise.double().numpy().reshape(seeds, positions, vocab_size)


def check_sampled_law(shape: str) -> None:
    found, band = total_variation_of(SHAPES[shape])
    assert found < band, f"total variation {found:.4f}, chance allows {band:.4f}"
