"""Who proposed which nodes of a tree that several drafters feed."""

from bisect import bisect_right
from collections import Counter

import numpy as np

from outrider.speculation.living_tree import LivingTree
from outrider.speculation.types import IntArray

MANY = 64
"""Stretches of births that are kept without a look at which of them are over."""


class Proposers:
    """Names by births: these ascend, so one name for each stretch of them says it for all nodes.

    A node that several drafters propose was born when the first of them did.
    """

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._names: list[str] = []

    def note(self, birth: int, name: str) -> None:
        """Nodes born from here on, until told otherwise, are proposed by ``name``."""
        if self._names and self._names[-1] == name:
            return
        if self._firsts and self._firsts[-1] == birth:
            self._names[-1] = name
        else:
            self._firsts.append(birth)
            self._names.append(name)

    def count(self, births: IntArray) -> dict[str, int]:
        """How many of these nodes, int64 ``[k]``, all born after the first ``note``, each has proposed."""
        if not len(births):
            return {}
        if len(self._names) == 1:
            return {self._names[0]: len(births)}
        stretches = np.searchsorted(self._firsts, births, side="right") - 1
        counts = Counter[str]()
        for stretch, nodes in zip(*np.unique(stretches, return_counts=True), strict=True):
            counts[self._names[stretch]] += int(nodes)
        return dict(counts)

    def keep_from(self, tree: LivingTree) -> None:
        """Forgets stretches, once they are many, that no node of the tree is from."""
        if len(self._firsts) > MANY:
            oldest = int(tree.births[tree.slots].min(initial=tree.counters[1]))
            over = max(0, bisect_right(self._firsts, oldest) - 1)
            del self._firsts[:over], self._names[:over]
