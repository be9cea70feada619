"""The immutable tree against brute-force ancestry, and what it refuses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.speculation.tree import MAX_TREE_DEPTH, ROOT, DraftTree, Law


@st.composite
def parent_lists(draw: st.DrawFn) -> list[int]:
    """Parents in topological order; chain-like and bushy ones alike, none deeper than allowed."""
    size = draw(st.integers(0, 40))
    nearness = draw(st.sampled_from([1, 2, 40]))
    parents: list[int] = []
    depths: list[int] = []
    for node in range(size):
        parent = draw(st.integers(max(ROOT, node - nearness), node - 1))
        if parent >= 0 and depths[parent] == MAX_TREE_DEPTH:
            parent = ROOT
        parents.append(parent)
        depths.append(1 + (depths[parent] if parent >= 0 else 0))
    return parents


def make(parents: list[int]) -> DraftTree:
    return DraftTree(
        tokens=np.arange(len(parents)),
        parent_indices=np.array(parents, np.int64),
        scores=np.ones(len(parents)),
        law=Law.DETERMINISTIC,
    )


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(parent_lists())
def test_mask_and_depths_equal_brute_force_ancestry(parents: list[int]) -> None:
    tree = make(parents)
    expected = np.zeros((len(parents), len(parents)), np.bool_)
    for node in range(len(parents)):
        ancestor = node
        while ancestor >= 0:
            expected[node, ancestor] = True
            ancestor = parents[ancestor]
    assert np.array_equal(tree.ancestor_mask, expected)
    assert tree.depths.tolist() == expected.sum(axis=1).tolist()
    assert len(tree) == len(parents)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 16, 17, 31, MAX_TREE_DEPTH])
def test_chains_of_every_scale_have_triangular_masks(length: int) -> None:
    tree = DraftTree.chain(range(length), Law.COUPLED)
    assert np.array_equal(tree.ancestor_mask, np.tril(np.ones((length, length), np.bool_)))


def test_an_empty_tree_has_no_nodes() -> None:
    tree = DraftTree.empty()
    assert len(tree) == 0
    assert tree.ancestor_mask.shape == (0, 0)
    assert tree.depths.shape == (0,)


@pytest.mark.parametrize(("parents", "node"), [([0], 0), ([-1, 1], 1), ([-1, 2, -1], 1), ([-1, -2], 1)])
def test_parents_must_stand_before_their_children(parents: list[int], node: int) -> None:
    with pytest.raises(ValueError, match=f"parent {parents[node]} of node {node}"):
        make(parents)


def test_too_deep_a_path_is_refused() -> None:
    with pytest.raises(ValueError, match=f"{MAX_TREE_DEPTH + 1} nodes"):
        DraftTree.chain(range(MAX_TREE_DEPTH + 1), Law.COUPLED)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="a tree of 2 tokens"):
        DraftTree(tokens=np.arange(2), parent_indices=np.array([-1]), scores=np.ones(2), law=Law.COUPLED)
    with pytest.raises(ValueError, match="a tree of 2 tokens"):
        DraftTree.chain([1, 2], Law.COUPLED, scores=[1.0])
