"""``outrider``: the command line. Each command is a module that registers its parser here.

Nothing imported at this level may import torch: ``--help`` answers at once, and Ctrl-C is
met by ``main`` while the heavy libraries load inside of a command.
"""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import outrider
from outrider.cluster.cli import generate
from outrider.cluster.cli.arguments import Parser, in_flags, nearest
from outrider.speculation.errors import (
    InvalidConfigError,
    InvalidRequestError,
    ModelNotFoundError,
    OutriderError,
    VocabularyMismatchError,
)

COMMANDS = (generate,)

FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 141
"""What a shell reports for a program that SIGPIPE ended; Python has no name for it on Windows."""

USAGE_ERRORS = (InvalidConfigError, InvalidRequestError, ModelNotFoundError, VocabularyMismatchError)
"""Errors that another command line mends."""

EXAMPLE = """\
example:
  outrider generate --prompt 'def fibonacci(n):'

'outrider COMMAND --help' lists the flags of a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; no argv means the process's own."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        return _guarded(words)
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    finally:
        if argv is None:
            # A second Ctrl-C, while the interpreter shuts down, would end in a traceback.
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _guarded(words: list[str]) -> int:
    """Turns every exception but an interruption into a line and an exit code."""
    try:
        code = _run(words)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except SystemExit as done:  # argparse, after --help or --version
        return int(done.code or 0)
    except BrokenPipeError:
        _abandon_output()
        return BROKEN_PIPE
    except OutriderError as error:
        _report(str(error), words)
        return WRONG_USAGE if isinstance(error, USAGE_ERRORS) else FAILED
    except OSError as error:
        _abandon_output()
        _report(str(error), words)
        return FAILED
    except Exception as error:
        _report(f"internal error (--debug shows where): {type(error).__name__}: {error}", words)
        return FAILED


def _run(words: list[str]) -> int:
    parser, commands = _parsers()
    _check_start(words, parser, commands)
    arguments = parser.parse_args(words)
    try:
        code: int = arguments.run(arguments)
    except (InvalidConfigError, InvalidRequestError) as error:
        error.args = (in_flags(str(error), arguments),)
        raise
    return code


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    """The whole line's parser, and each command's by its name."""
    parser = Parser(prog="outrider", description=outrider.__doc__, epilog=EXAMPLE)
    parser.add_argument("--version", action="version", version=f"outrider {outrider.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.register(commands)
    return parser, dict(commands.choices)


def _check_start(words: list[str], parser: Parser, commands: dict[str, Parser]) -> None:
    """Checks what stands before the command: argparse would take an unknown flag's value for one."""
    for word in words:
        if word in commands or word in ("-h", "--help", "--version"):
            return
        if not word.startswith("-"):
            raise InvalidConfigError(f"unknown command {word!r}; did you mean {nearest(word, commands)!r}?")
        if word not in parser.flags:
            _refuse_early_flag(word.partition("=")[0], parser, commands)
    raise InvalidConfigError(f"a command is missing: {', '.join(commands)}; see outrider --help")


def _refuse_early_flag(flag: str, parser: Parser, commands: dict[str, Parser]) -> NoReturn:
    for name, command in commands.items():
        if flag in command.flags:
            raise InvalidConfigError(f"{flag} belongs after its command: outrider {name} {flag}")
    known = {*parser.flags, *(each for command in commands.values() for each in command.flags)}
    raise InvalidConfigError(f"unknown flag {flag!r}; did you mean {nearest(flag, known)!r}?")


def _report(message: str, words: list[str]) -> None:
    if "--debug" in words:
        traceback.print_exc()
    _say("error: " + " ".join(message.splitlines()))


def _say(message: str) -> None:
    if sys.stderr is None:
        return
    # A half-written line, or the terminal's own "^C", may stand before the cursor.
    start = "\n" if message == "interrupted" and sys.stderr.isatty() else ""
    print(f"{start}outrider: {message}", file=sys.stderr)


def _abandon_output() -> None:
    """Sends what is still buffered nowhere: the interpreter flushes once more when it exits."""
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
