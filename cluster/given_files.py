"""Files that a person names: what cannot be read or written is said in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from outrider.speculation.errors import InvalidConfigError


def read_text(path: str, what: str) -> str:
    """A file's text.

    Raises:
        InvalidConfigError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidConfigError(f"the {what} {path!r} cannot be read: {reason}") from None


@contextmanager
def writing(what: str) -> Iterator[None]:
    """A block that opens or writes a file.

    what: the file, as the message names it.

    Raises:
        InvalidConfigError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise InvalidConfigError(f"{what} cannot be written: {error.strerror}") from error
