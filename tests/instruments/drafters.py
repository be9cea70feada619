"""Drafters from perfect to hostile."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from outrider.actors.drafting import DraftSession
from outrider.speculation.living_tree import DROPPED, LivingTree, Reroot
from outrider.speculation.request import Request
from outrider.speculation.statistics import SpeculationStatistics
from outrider.speculation.tree import ROOT, DraftTree, Law
from outrider.speculation.types import IntArray

Propose = Callable[[list[int]], DraftTree]
"""A tree for the committed text."""
Grow = Callable[[LivingTree, list[int], int], None]
"""Grows the living tree below the committed text; the number counts the session's draft steps."""


def make_tree(tokens: Sequence[int], parents: Sequence[int]) -> DraftTree:
    return DraftTree(
        tokens=np.array(tokens, np.int64),
        parent_indices=np.array(parents, np.int64),
        scores=np.ones(len(tokens)),
        law=Law.DETERMINISTIC,
    )


def chain(tokens: Sequence[int]) -> DraftTree:
    return make_tree(tokens, range(ROOT, len(tokens) - 1))


class RawTree(LivingTree):
    """Hands out a given tree as it is: twins, odd orders, what a living tree never holds."""

    def __init__(self) -> None:
        super().__init__(Law.DETERMINISTIC, 1)
        self.raw: DraftTree | None = None

    @property
    def is_bare(self) -> bool:
        return self.raw is None

    def frontier(self, width: int) -> IntArray:
        return np.full(min(width, int(self.raw is None)), ROOT)

    def select(self, budget: int, min_score: float = 0.0) -> tuple[DraftTree, IntArray]:  # noqa: ARG002
        raw = self.raw or DraftTree.empty()
        assert len(raw) <= budget, "the script proposes more than the engine's budget"
        return raw, np.arange(len(raw))

    def reroot(self, committed: IntArray) -> Reroot:
        self.raw = None
        none = np.zeros(0, np.int64)
        return Reroot(path_slots=none, kept_slots=none, num_committed=len(committed))


class ScriptedSession:
    """Proposes one whole tree per round."""

    def __init__(self, propose: Propose, prompt_ids: IntArray) -> None:
        self.tree: LivingTree = RawTree()
        self.text = prompt_ids.tolist()
        self.closed = False
        self._propose = propose

    def grow(self, width: int) -> int:  # noqa: ARG002
        assert isinstance(self.tree, RawTree)
        self.tree.raw = self._propose(self.text)
        return 1

    def proposers(self, slots: IntArray) -> dict[str, int]:
        return {"scripted": len(slots)}

    def commit(self, tokens: IntArray) -> Reroot:
        self.text += tokens.tolist()
        return self.tree.reroot(tokens)

    def close(self) -> None:
        self.closed = True


class GrowingSession(ScriptedSession):
    """Grows a living tree which survives commits."""

    def __init__(self, grow: Grow, prompt_ids: IntArray, capacity: int) -> None:
        self.tree = LivingTree(Law.DETERMINISTIC, capacity)
        self.text = prompt_ids.tolist()
        self.closed = False
        self._grow, self._steps = grow, 0

    def grow(self, width: int) -> int:
        self._grow(self.tree, self.text, self._steps)
        self._steps += 1
        return width


class EachGrows:
    """Sessions that grow one by one."""

    def grow(self, sessions: Sequence[ScriptedSession], width: int) -> list[int]:
        return [session.grow(width) for session in sessions]


class Scripted(EachGrows):
    """A ``DraftEngine`` of scripted sessions; ``sessions`` lists them."""

    def __init__(self, propose: Propose) -> None:
        self.propose = propose
        self.sessions: list[DraftSession] = []

    def open(self, request: Request, stats: SpeculationStatistics) -> DraftSession:  # noqa: ARG002
        self.sessions.append(ScriptedSession(self.propose, request.prompt_ids))
        return self.sessions[-1]


class Growing(EachGrows):
    """A ``DraftEngine`` of growing sessions."""

    def __init__(self, grow: Grow, *, capacity: int = 24) -> None:
        self.by, self.capacity = grow, capacity

    def open(self, request: Request, stats: SpeculationStatistics) -> DraftSession:  # noqa: ARG002
        return GrowingSession(self.by, request.prompt_ids, self.capacity)


def perfect(truth: Sequence[int], length: int) -> Propose:
    """The next ``length`` tokens of ``truth``, the whole text that plain decoding gives."""
    return lambda text: chain(truth[len(text) : len(text) + length])


def always_wrong(truth: Sequence[int], length: int, vocab_size: int) -> Propose:
    """Nothing but tokens that plain decoding does not take."""

    def propose(text: list[int]) -> DraftTree:
        return chain([(each + 1) % vocab_size for each in truth[len(text) : len(text) + length]])

    return propose


def partly_right(truth: Sequence[int], length: int, nodes: int, vocab_size: int, seed: int) -> Propose:
    """Up to ``length`` true tokens among junk, ``nodes`` in all: any number is accepted, at any indices."""

    def propose(text: list[int]) -> DraftTree:
        rng = np.random.default_rng([seed, len(text)])
        right = chain(truth[len(text) : len(text) + int(rng.integers(0, length + 1))])
        return permuted(grafted(right, junk(nodes - len(right), vocab_size, seed)(text), rng), rng)

    return propose


def junk(nodes: int, vocab_size: int, seed: int, *, deep: int = 3) -> Propose:
    """A random tree with twins and unbalanced branches; a function of the length of the text."""

    def propose(text: list[int]) -> DraftTree:
        rng = np.random.default_rng([seed, len(text), 1])
        parents = [int(rng.integers(max(ROOT, node - deep), node)) for node in range(nodes)]
        return make_tree(rng.integers(0, vocab_size, nodes).tolist(), parents)

    return propose


def wrong_parents(truth: Sequence[int], vocab_size: int) -> Propose:
    """The right tokens in the right order, but the second and third hang below wrong siblings."""

    def propose(text: list[int]) -> DraftTree:
        first, second, third = (*truth[len(text) : len(text) + 3], 0, 0, 0)[:3]
        wrong = (first + 1) % vocab_size
        # root -> wrong -> second -> third; root -> first -> wrong -> third; root -> second
        return make_tree([wrong, second, third, first, wrong, third, second], [-1, 0, 1, -1, 3, 4, -1])

    return propose


def with_token_inside(propose: Propose, token: int) -> Propose:
    """Every tree also offers ``token`` (EOS) below the root and below every node, with a child."""

    def more(text: list[int]) -> DraftTree:
        tree = propose(text)
        nodes = len(tree)
        tokens, parents = tree.tokens.tolist(), tree.parent_indices.tolist()
        for parent in range(ROOT, nodes):
            tokens += [token, token]
            parents += [parent, len(tokens) - 2]
        return make_tree(tokens, parents)

    return more


def shuffled(propose: Propose, seed: int) -> Propose:
    """The same trees in another topological order."""
    return lambda text: permuted(propose(text), np.random.default_rng([seed, len(text)]))


def grafted(
    left: DraftTree, right: DraftTree, rng: np.random.Generator, *, below_root: bool = False
) -> DraftTree:
    """Both trees; the right one's first nodes hang below random nodes of the left one, or the root."""
    shift = len(left)
    below = np.full(len(right), ROOT) if below_root else rng.integers(ROOT, shift, len(right))
    parents = np.where(right.parent_indices == ROOT, below, right.parent_indices + shift)
    return make_tree(
        np.concatenate((left.tokens, right.tokens)).tolist(),
        np.concatenate((left.parent_indices, parents)).tolist(),
    )


def permuted(tree: DraftTree, rng: np.random.Generator) -> DraftTree:
    """The same nodes in a random topological order, not sorted by depth."""
    waiting, order = list(range(len(tree))), list[int]()
    while waiting:
        ready = [
            node
            for node in waiting
            if tree.parent_indices[node] == ROOT or tree.parent_indices[node] in order
        ]
        order.append(int(rng.choice(ready)))
        waiting.remove(order[-1])
    rank = {ROOT: ROOT} | {node: index for index, node in enumerate(order)}
    return make_tree(tree.tokens[order].tolist(), [rank[int(tree.parent_indices[node])] for node in order])


def endless(vocab_size: int) -> Grow:
    """Never runs out of frontier and always scores itself highest."""

    def grow(tree: LivingTree, text: list[int], step: int) -> None:
        rng = np.random.default_rng([len(text), step])
        parents = rng.choice(np.append(tree.slots, ROOT), 40)
        tree.add(parents, rng.integers(0, vocab_size, 40), np.ones(40))

    return grow


def zero_scores(vocab_size: int) -> Grow:
    """Thinks nothing of its own guesses."""

    def grow(tree: LivingTree, text: list[int], step: int) -> None:
        frontier = tree.frontier(4)
        rng = np.random.default_rng([len(text), step])
        tree.mark_expanded(frontier)
        tokens = rng.integers(0, vocab_size, len(frontier) * 2)
        tree.add(np.repeat(frontier, 2), tokens, np.zeros(len(tokens)))

    return grow


def levelwise(guess: Callable[[list[int]], Sequence[int]]) -> Grow:
    """Expands the best frontier node of every step with ``guess`` of its path's children."""
    remember = cache(lambda text: tuple(guess(list(text))))

    def grow(tree: LivingTree, text: list[int], step: int) -> None:  # noqa: ARG001
        for node in tree.frontier(2).tolist():
            children = remember(tuple(text + tokens_to(tree, node)))
            tree.mark_expanded(node)
            scores = 0.9 ** np.arange(1, len(children) + 1)
            assert (tree.add([node] * len(children), children, scores) >= DROPPED).all()

    return grow


def tokens_to(tree: LivingTree, slot: int) -> list[int]:
    """The tokens from the root to a slot."""
    tokens: list[int] = []
    while slot != ROOT:
        tokens.append(int(tree.tokens[slot]))
        slot = int(tree.parents[slot])
    return tokens[::-1]
