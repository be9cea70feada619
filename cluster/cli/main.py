"""``outrider``: the process's entry point, where every exception becomes a line and an exit code.

Ctrl-C may come at any moment, so all that takes time to import is imported in the guarded part.
"""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType

from outrider.speculation.errors import (
    InvalidConfigError,
    InvalidRequestError,
    ModelNotFoundError,
    OutriderError,
    VocabularyMismatchError,
)

FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
"""The last two are what a shell reports for a program that SIGINT or SIGPIPE ended."""

IMPORT_PATIENCE = 0.05
"""Seconds from an interruption that came too early to the next look."""

USAGE_ERRORS = (InvalidConfigError, InvalidRequestError, ModelNotFoundError, VocabularyMismatchError)
"""Errors that another command line mends."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; no argv means the process's own."""
    words = sys.argv[1:] if argv is None else list(argv)
    # gRPC notes on standard error whatever ends a connection; what matters of it is told in our words.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        return _guarded(words)
    except KeyboardInterrupt:
        # The terminal's own "^C" stands before the cursor.
        _say("outrider: interrupted", fresh_line=True)
        return INTERRUPTED
    finally:
        if argv is None:
            # A second Ctrl-C, while the interpreter shuts down, would end in a traceback.
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C; a moment later where PyTorch is being imported, whose C++ aborts when an exception comes."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if getattr(spec, "_initializing", False):
        threading.Timer(IMPORT_PATIENCE, os.kill, (os.getpid(), number)).start()
    else:
        signal.default_int_handler(number, frame)


def _guarded(words: list[str]) -> int:
    """Turns every exception but an interruption into a line and an exit code."""
    try:
        from outrider.cluster.cli.commands import run

        code = run(words)
        if sys.stdout is not None:
            # Here, and not when the interpreter exits, a failure can still be reported.
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        _abandon_output()
        return BROKEN_PIPE
    except OutriderError as error:
        return _failed(str(error), words, WRONG_USAGE if isinstance(error, USAGE_ERRORS) else FAILED)
    except OSError as error:
        _abandon_output()
        return _failed(str(error), words, FAILED)
    except Exception as error:
        # Who raises it has imported it; to import PyTorch here might be the next failure.
        library = sys.modules.get("outrider.kernels.native.library")
        if library is not None and isinstance(error, library.UnknownKernelError):
            return _failed(str(error), words, WRONG_USAGE)
        what = f"{type(error).__name__}: {error}"
        return _failed(f"internal error (--debug shows where): {what}", words, FAILED)


def _failed(message: str, words: list[str], code: int) -> int:
    if "--debug" in words:
        import traceback

        traceback.print_exc()
    _say("outrider: error: " + " ".join(message.splitlines()))
    return code


def _say(line: str, *, fresh_line: bool = False) -> None:
    if sys.stderr is not None:
        start = "\n" if fresh_line and sys.stderr.isatty() else ""
        print(start + line, file=sys.stderr)


def _abandon_output() -> None:
    """Sends what is still buffered nowhere: the interpreter flushes once more when it exits."""
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


if __name__ == "__main__":
    sys.exit(main())
