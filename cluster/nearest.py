"""What someone may have meant who wrote a name that does not exist."""

import difflib
from collections.abc import Iterable

from outrider.speculation.errors import InvalidConfigError


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that looks most like this one."""
    return difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]


def refuse_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises InvalidConfigError for a key that is not known, naming the nearest one."""
    names = sorted(known)
    for key in given:
        if key not in names:
            raise InvalidConfigError(
                f"{where}: unknown key {key!r}; did you mean {nearest(str(key), names)!r}?"
            )
