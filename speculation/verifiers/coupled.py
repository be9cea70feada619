"""The default rule: a drafted token stays when it is the target's own seeded draw."""

from outrider.speculation.tree import DraftTree, Law
from outrider.speculation.types import IntArray, Verdict
from outrider.speculation.verifiers.match import match


class CoupledVerifier:
    """Coupled sampling (Daliri, Musco and Suresh, coupling without communication).

    The target's token at a position is its draw with the request's counter-based noise,
    which no draft can influence. Only such draws are committed, whatever the tree holds, so
    the output equals plain decoding with the same seed and the rule is exact for any law of
    siblings. Drafting with the same noise (``Law.COUPLED``) merely makes matches likely.
    """

    name = "coupled"
    laws = frozenset(Law)

    def verify(self, tree: DraftTree, target_tokens: IntArray) -> Verdict:
        """See ``Verifier.verify``; ``target_tokens`` are the target's seeded draws."""
        return match(tree, target_tokens)
