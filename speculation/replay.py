"""Other policies over recorded verifications, without a model.

The target's own token at a position is a function of the text before it, so whatever is verified,
the text stays the recorded one; a policy only decides how many steps it takes. What the target says
of a node is known where the node was verified then, so a policy can choose among the recorded nodes
and no others. Where it commits less than the recorded step did, it goes on with what was recorded
below the nodes that it has reached; a drafter would have had more by then.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from outrider.speculation.step_cost import StepCostModel
from outrider.speculation.tree import ROOT, DraftTree
from outrider.speculation.types import FloatArray, IntArray
from outrider.speculation.verifiers.match import match


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordedStep:
    """One request's part of a target step that verified a tree, perhaps an empty one.

    position: tokens of the text before it. num_committed: what it added.
    target_tokens: int64 ``[nodes + 1]``, see ``Verifier.verify``.
    company: requests of the step that verified. rows, seconds: of the whole forward.
    draft_steps, draft_seconds: of this request since its step before.
    """

    position: int
    num_committed: int
    tree: DraftTree
    target_tokens: IntArray
    company: int
    rows: int
    seconds: float
    draft_steps: int
    draft_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayPolicy:
    """Which of a tree's nodes are verified.

    num_speculative_tokens: the best so many; None: all. depth: none that lie deeper.
    chain: only the root's best child, its best child, and so on.
    """

    num_speculative_tokens: int | None = None
    depth: int | None = None
    chain: bool = False

    def choose(self, tree: DraftTree) -> IntArray:
        """Indices of the nodes to verify, int64, ascending; each stands behind its parent."""
        nodes = _first_children(tree) if self.chain else np.arange(len(tree))
        if self.depth is not None:
            nodes = nodes[tree.depths[nodes] <= self.depth]
        # Recorded trees have their best nodes first.
        return nodes[: self.num_speculative_tokens]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedStep:
    """A step of a policy: nodes that it verified, the deepest of them, and what it committed.

    company: as in the recorded step whose tree it used.
    """

    num_nodes: int
    depth: int
    num_accepted: int
    num_committed: int
    company: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayCosts:
    """What steps take, learnt from a recording.

    target: seconds by rows, ``[R]``. draft_seconds: of a draft step. round_trip: of a round with a
    drafter in another process that the target waits for; 0 where it does not.
    hides_drafting: whether drafting goes on while the target verifies, and costs it nothing.
    """

    target: FloatArray
    draft_seconds: float
    round_trip: float
    hides_drafting: bool

    def seconds(self, step: ReplayedStep) -> float:
        """A request's share of a step if everybody in it did the same."""
        return self._forward(step.company, 1 + step.num_nodes) + self._drafting(step)

    def plain_seconds(self, step: ReplayedStep) -> float:
        """The same of plain decoding, for the tokens that the step committed."""
        return step.num_committed * self._forward(step.company, 1)

    def _forward(self, company: int, rows: int) -> float:
        return float(self.target[min(company * rows, len(self.target)) - 1]) / company

    def _drafting(self, step: ReplayedStep) -> float:
        if self.hides_drafting or not step.depth:
            return 0.0
        return self.round_trip + step.depth * self.draft_seconds


def replay(steps: Sequence[RecordedStep], policy: ReplayPolicy) -> Iterator[ReplayedStep]:
    """The steps that the policy takes for one request's recorded text.

    steps: all of the request, in order.

    Raises:
        ValueError: a step does not begin where the one before it ended.
    """
    for before, after in pairwise(steps):
        if after.position != before.position + before.num_committed:
            raise ValueError(
                f"a step at position {after.position} follows one that ended at "
                f"{before.position + before.num_committed}"
            )
    for recorded in steps:
        yield from _within(recorded, policy)


def fitted_curve(steps: Sequence[RecordedStep], max_rows: int) -> FloatArray:
    """Seconds of a target step with 1, 2, ... ``max_rows`` rows, as the recorded ones took."""
    model = StepCostModel()
    for step in steps:
        model.observe(step.rows, step.seconds)
    return model.curve(max_rows)


def _within(recorded: RecordedStep, policy: ReplayPolicy) -> Iterator[ReplayedStep]:
    """Steps from where a recorded step began to where it ended."""
    tree, tokens = recorded.tree, recorded.target_tokens
    path = match(tree, tokens).accepted
    done = 0
    while done < recorded.num_committed:
        subtree, answers = _below(tree, tokens, ROOT if done == 0 else int(path[done - 1]))
        chosen = policy.choose(subtree)
        verified = _part_of(subtree, chosen)
        verdict = match(verified, answers[np.append(0, chosen + 1)])
        # A text may end before all that was accepted.
        committed = min(verdict.num_accepted_tokens + 1, recorded.num_committed - done)
        yield ReplayedStep(
            num_nodes=len(verified),
            depth=int(verified.depths.max(initial=0)),
            num_accepted=verdict.num_accepted_tokens,
            num_committed=committed,
            company=recorded.company,
        )
        done += committed


def _below(tree: DraftTree, tokens: IntArray, root: int) -> tuple[DraftTree, IntArray]:
    """The tree below one of its nodes, and what the target takes after that node and each of these."""
    if root == ROOT:
        return tree, tokens
    below = tree.ancestor_mask[:, root].copy()
    below[root] = False
    nodes = np.flatnonzero(below)
    return _part_of(tree, nodes, root), tokens[np.append(root, nodes) + 1]


def _part_of(tree: DraftTree, nodes: IntArray, root: int = ROOT) -> DraftTree:
    """These nodes as a tree of their own, hanging below ``root``."""
    index = np.full(len(tree) + 1, ROOT)
    index[nodes] = np.arange(len(nodes))
    parents = tree.parent_indices[nodes]
    return DraftTree(
        tokens=tree.tokens[nodes],
        parent_indices=np.where(parents == root, ROOT, index[parents]),
        scores=tree.scores[nodes],
        law=tree.law,
    )


def _first_children(tree: DraftTree) -> IntArray:
    """The path on which every node is the first, so the best, child of its parent."""
    path: list[int] = []
    while True:
        children = np.flatnonzero(tree.parent_indices == (path[-1] if path else ROOT))
        if not len(children):
            return np.array(path, np.int64)
        path.append(int(children[0]))
