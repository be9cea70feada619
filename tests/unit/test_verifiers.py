"""The matching rules against a walk from the root."""

import numpy as np
import pytest

from outrider.speculation.errors import InvalidConfigError
from outrider.speculation.tree import MAX_TREE_DEPTH, ROOT, DraftTree, Law
from outrider.speculation.types import Verdict, Verifier
from outrider.speculation.verifiers.registry import make_verifier

NAMES = ["coupled", "greedy"]


class Truth:
    """What a target takes after each path: a function of the path, so twins agree."""

    def __init__(self, seed: int, vocabulary: int) -> None:
        self.seed, self.vocabulary = seed, vocabulary

    def after(self, path: tuple[int, ...]) -> int:
        return int(np.random.default_rng([self.seed, len(path), *path]).integers(self.vocabulary))

    def of(self, tree: DraftTree) -> np.ndarray:
        return np.array([self.after(())] + [self.after(path) for path in paths_of(tree)], np.int64)


def paths_of(tree: DraftTree) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parent_indices.tolist(), strict=True):
        paths.append((*paths[parent], token) if parent >= 0 else (token,))
    return paths


def walk(tree: DraftTree, truth: Truth) -> tuple[tuple[int, ...], int]:
    """The tokens that plain decoding takes while the tree has them, and the one after."""
    known, path = set(paths_of(tree)), ()
    while (*path, truth.after(path)) in known:
        path = (*path, truth.after(path))
    return path, truth.after(path)


def random_tree(rng: np.random.Generator, law: Law, vocabulary: int) -> DraftTree:
    """Bushy or slim; so few tokens that siblings are often twins."""
    nodes = int(rng.integers(0, 24))
    near = int(rng.integers(1, 6))
    parents = [int(rng.integers(max(ROOT, node - near), node)) for node in range(nodes)]
    return DraftTree(
        tokens=rng.integers(0, vocabulary, nodes),
        parent_indices=np.array(parents, np.int64),
        scores=np.ones(nodes),
        law=law,
    )


def permuted(tree: DraftTree, rng: np.random.Generator) -> DraftTree:
    """The same nodes in another topological order."""
    keys = np.array([rng.random() for _ in range(len(tree))])
    order = np.lexsort((keys, tree.depths))
    rank = np.empty(len(tree), np.int64)
    rank[order] = np.arange(len(tree))
    parents = tree.parent_indices[order]
    return DraftTree(
        tokens=tree.tokens[order],
        parent_indices=np.where(parents < 0, ROOT, rank[parents]),
        scores=tree.scores[order],
        law=tree.law,
    )


def accepted_tokens(tree: DraftTree, verdict: Verdict) -> tuple[int, ...]:
    """Also checks that the accepted nodes are one path from the root."""
    parents = tree.parent_indices[verdict.accepted].tolist()
    assert parents == ([ROOT, *verdict.accepted[:-1].tolist()] if parents else [])
    return tuple(tree.tokens[verdict.accepted].tolist())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("law", list(Law))
def test_the_verdict_equals_a_walk_with_twins_and_in_any_order(name: str, law: Law) -> None:
    rng = np.random.default_rng(7)
    verifier = make_verifier(name)
    lengths, twins = set(), 0
    for seed in range(150):
        vocabulary = int(rng.integers(1, 4))
        tree, truth = random_tree(rng, law, vocabulary), Truth(seed, vocabulary)
        twins += len(set(paths_of(tree))) < len(tree)
        for each in (tree, permuted(tree, rng)):
            verdict = verifier.verify(each, truth.of(each))
            assert (accepted_tokens(each, verdict), verdict.token) == walk(each, truth)
            lengths.add(verdict.num_accepted_tokens)
    assert {0, 1, 2, 3} <= lengths
    assert twins > 20


def test_twins_do_not_shorten_the_path_and_the_first_wins() -> None:
    tree = DraftTree(
        tokens=np.array([5, 5, 6, 6]),
        parent_indices=np.array([ROOT, ROOT, 1, 1]),
        scores=np.ones(4),
        law=Law.COUPLED,
    )
    verdict = make_verifier("coupled").verify(tree, np.array([5, 6, 6, 9, 9]))
    assert verdict.accepted.tolist() == [1, 2]
    assert verdict.token == 9
    only_twins = make_verifier("coupled").verify(tree, np.array([5, 7, 7, 0, 0]))
    assert only_twins.accepted.tolist() == [0]


@pytest.mark.parametrize("name", NAMES)
def test_bonus_and_recovered_tokens(name: str) -> None:
    verifier = make_verifier(name)
    tree = DraftTree.chain([1, 2, 3], Law.DETERMINISTIC)
    for target, accepted, token in [
        ([1, 2, 3, 4], [0, 1, 2], 4),
        ([1, 9, 3, 4], [0], 9),
        ([9, 2, 3, 4], [], 9),
    ]:
        verdict = verifier.verify(tree, np.array(target))
        assert (verdict.accepted.tolist(), verdict.token) == (accepted, token)
    plain = verifier.verify(DraftTree.empty(), np.array([8]))
    assert (plain.accepted.tolist(), plain.token) == ([], 8)


def test_the_deepest_chain_is_accepted_whole() -> None:
    tree = DraftTree.chain(range(MAX_TREE_DEPTH), Law.COUPLED)
    verdict = make_verifier("coupled").verify(tree, np.arange(MAX_TREE_DEPTH + 1))
    assert verdict.num_accepted_tokens == MAX_TREE_DEPTH


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("nodes", [0, 2])
def test_lengths_must_agree(name: str, nodes: int) -> None:
    with pytest.raises(ValueError, match=f"a tree of {nodes} nodes"):
        make_verifier(name).verify(DraftTree.chain(range(nodes), Law.COUPLED), np.arange(nodes + 2))


@pytest.mark.parametrize("name", NAMES)
def test_verifiers_are_made_by_name(name: str) -> None:
    verifier: Verifier = make_verifier(name)
    assert verifier.name == name
    assert verifier.laws == set(Law)


@pytest.mark.parametrize(
    ("name", "nearest"), [("couple", "coupled"), ("Greedy", "greedy"), ("gred", "greedy")]
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(InvalidConfigError, match=f"'{name}'; did you mean '{nearest}'"):
        make_verifier(name)
    with pytest.raises(InvalidConfigError, match="'@@'"):
        make_verifier("@@")
