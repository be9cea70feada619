"""The commands of ``outrider``. Each is a module that registers its own parser.

No such module may import torch before its command runs: ``--help`` answers at once.
"""

import argparse
from typing import Any, NoReturn

from outrider.cluster.cli import (
    bench,
    check,
    demo,
    doctor,
    down,
    draft_worker,
    generate,
    replay,
    run_batch,
    serve,
    simulate,
    status,
    trace,
    up,
)
from outrider.cluster.cli.arguments import Parser, in_flags
from outrider.cluster.nearest import nearest
from outrider.speculation.errors import InvalidConfigError, InvalidRequestError

COMMANDS = (
    generate,
    serve,
    run_batch,
    demo,
    up,
    down,
    status,
    check,
    doctor,
    draft_worker,
    simulate,
    trace,
    replay,
    bench,
)

DESCRIPTION = "Speculative decoding that gives the target's own tokens, faster."

EXAMPLE = """\
example:
  outrider generate --prompt 'def fibonacci(n):'

'outrider COMMAND --help' lists the flags of a command.
"""


def run(words: list[str]) -> int:
    """Runs the command that the words name; its exit code.

    Raises:
        InvalidConfigError: the words are no known command line.
        OutriderError: what the command raises.
    """
    parser, commands = _parsers()
    _check_start(words, parser, commands)
    try:
        arguments = parser.parse_args(words)
    except SystemExit:  # argparse's way to end after --help and --version; errors are exceptions
        return 0
    try:
        code: int = arguments.run(arguments)
    except (InvalidConfigError, InvalidRequestError) as error:
        error.args = (in_flags(str(error), arguments),)
        raise
    return code


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import importlib.metadata

        print(f"outrider {importlib.metadata.version('outrider')}")
        parser.exit()


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    """The whole line's parser, and each command's by its name."""
    parser = Parser(prog="outrider", description=DESCRIPTION, epilog=EXAMPLE)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
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
