"""Verifiers by the name that a configuration gives."""

import difflib

from outrider.speculation.errors import InvalidConfigError
from outrider.speculation.types import Verifier
from outrider.speculation.verifiers.coupled import CoupledVerifier
from outrider.speculation.verifiers.greedy import GreedyVerifier

VERIFIERS: dict[str, type[Verifier]] = {
    CoupledVerifier.name: CoupledVerifier,
    GreedyVerifier.name: GreedyVerifier,
}


def make_verifier(name: str) -> Verifier:
    """The verifier called ``name``.

    Raises:
        InvalidConfigError: there is none; the message names the nearest one.
    """
    if name in VERIFIERS:
        return VERIFIERS[name]()
    nearest = difflib.get_close_matches(name, VERIFIERS, n=1, cutoff=0.0)[0]
    raise InvalidConfigError(f"unknown verification {name!r}; did you mean {nearest!r}?")
