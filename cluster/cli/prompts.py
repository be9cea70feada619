"""Where a command's prompts come from: flags, a file, or standard input."""

import sys
from collections.abc import Sequence
from pathlib import Path

from outrider.speculation.errors import InvalidRequestError

HOW = "give --prompt TEXT or --prompt-file FILE, or pipe a text in"


def read_prompts(texts: Sequence[str] | None, file: str | None) -> list[str]:
    """The given texts, else the lines of the file, else all of standard input as one prompt.

    Raises:
        InvalidRequestError: there is no prompt, one is empty, or something cannot be read.
    """
    if texts is not None:
        return [_checked(text) for text in texts]
    if file is not None:
        return _lines(file)
    return [_standard_input()]


def _checked(text: str) -> str:
    if not text:
        raise InvalidRequestError("--prompt must not be empty, and '' is")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(f"--prompt must be UTF-8, and {text!r} is not") from None
    return text


def _lines(file: str) -> list[str]:
    try:
        data = Path(file).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidRequestError(f"the prompt file {file!r} cannot be read: {reason}") from error
    lines = [line for line in _decoded(data, f"the prompt file {file!r}").split("\n") if line.strip()]
    if not lines:
        raise InvalidRequestError(f"the prompt file {file!r} has no prompt: every line is blank")
    return lines


def _standard_input() -> str:
    """Without its last newline, which ``echo`` adds and nobody means."""
    if sys.stdin is None or sys.stdin.isatty():
        raise InvalidRequestError(f"there is no prompt: {HOW}")
    text = _decoded(sys.stdin.buffer.read(), "standard input").removesuffix("\n")
    if not text:
        raise InvalidRequestError(f"there is no prompt, and standard input is empty: {HOW}")
    return text


def _decoded(data: bytes, source: str) -> str:
    """Text without a byte order mark and with Unix line ends."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise InvalidRequestError(f"{source} is not UTF-8: {byte}") from None
    return text.replace("\r\n", "\n")
