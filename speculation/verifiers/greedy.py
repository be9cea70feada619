"""Temperature zero: a drafted token stays when the target ranks it first."""

from outrider.speculation.tree import DraftTree, Law
from outrider.speculation.types import IntArray, Verdict
from outrider.speculation.verifiers.match import match


class GreedyVerifier:
    """Greedy tree match.

    Only the target's own first choices are committed, so the output equals plain greedy
    decoding whatever the law by which siblings were produced.
    """

    name = "greedy"
    laws = frozenset(Law)

    def verify(self, tree: DraftTree, target_tokens: IntArray) -> Verdict:
        """See ``Verifier.verify``; ``target_tokens`` are the argmax after each node at temperature 0."""
        return match(tree, target_tokens)
