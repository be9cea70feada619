"""Matching a tree against the tokens that the target itself takes."""

import numpy as np

from outrider.speculation.tree import DraftTree
from outrider.speculation.types import IntArray, Verdict

_NOTHING: IntArray = np.zeros(0, np.int64)


def match(tree: DraftTree, target_tokens: IntArray) -> Verdict:
    """The longest path of ``tree`` on which every token is the target's own.

    A node is accepted when its token equals the target's after its parent and its parent is
    accepted. Accepted nodes of equal depth differ only if someone sent the same child twice;
    the path then follows the twin with the longest continuation, the first one on ties, so a
    duplicate never shortens what is accepted.

    target_tokens: int64 ``[nodes + 1]``, see ``Verifier.verify``.

    Raises:
        ValueError: the lengths differ.
    """
    if target_tokens.shape != (len(tree) + 1,):
        raise ValueError(f"{target_tokens.shape} target tokens for a tree of {len(tree)} nodes")
    if not len(tree):
        return Verdict(accepted=_NOTHING, token=int(target_tokens[0]))
    agrees = tree.tokens == target_tokens[tree.parent_indices + 1]
    accepted = (tree.ancestor_mask <= agrees).all(axis=1)
    depths = np.where(accepted, tree.depths, 0)
    last = int(depths.argmax())
    if not depths[last]:
        return Verdict(accepted=_NOTHING, token=int(target_tokens[0]))
    return Verdict(accepted=tree.ancestor_mask[last].nonzero()[0], token=int(target_tokens[last + 1]))
