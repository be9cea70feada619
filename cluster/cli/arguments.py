"""What all commands share in reading their arguments: strict flags, and errors of one line."""

import argparse
import json
from collections.abc import Sequence
from typing import Any, NoReturn, TypeAlias

from outrider.cluster.nearest import nearest
from outrider.speculation.errors import InvalidConfigError

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""Where a command's module registers its parser."""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are exceptions of ours."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Raises InvalidConfigError in place of printing the usage and exiting."""
        raise InvalidConfigError(_readable(message))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, but nothing may be left over, so each command names its own flags."""
        known, strange = super().parse_known_args(args, namespace)
        if strange:
            self._refuse(strange)
        return known, strange

    @property
    def flags(self) -> list[str]:
        """Every spelling of every flag."""
        return list(self._option_string_actions)

    def _get_option_tuples(self, option_string: str) -> list[Any]:  # noqa: ARG002
        # allow_abbrev covers only flags with two dashes: "-s" would still be taken for "-sc".
        return []

    def _refuse(self, strange: Sequence[str]) -> NoReturn:
        flag = next((each for each in strange if each.startswith("-")), None)
        if flag is None:
            raise InvalidConfigError(f"unexpected argument {strange[0]!r}; see {self.prog} --help")
        name = flag.partition("=")[0]
        raise InvalidConfigError(f"unknown flag {name!r}; did you mean {nearest(name, self.flags)!r}?")


def _readable(message: str) -> str:
    """argparse's message as a sentence about the flag."""
    flag, colon, problem = message.removeprefix("argument ").partition(": ")
    if not colon or not flag.startswith("-"):
        return message
    if problem == "expected one argument":
        return f"{flag} needs a value (if it begins with '-', write {flag.split('/')[-1]}=VALUE)"
    return f"{flag} {problem.replace('not allowed with argument', 'cannot be given together with')}"


def in_flags(message: str, arguments: argparse.Namespace) -> str:
    """An error about a parameter, in terms of the flag that set it: ``--top-p must be …``."""
    name, verb, rest = message.removeprefix("speculative_config: ").partition(" must ")
    if not verb or getattr(arguments, name, None) is None:
        return message
    return f"--{name.replace('_', '-')} must {rest}"


def integer(text: str) -> int:
    """For ``type=``."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, not {text!r}") from None


def real(text: str) -> float:
    """For ``type=``."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None


def json_object(text: str) -> dict[str, Any]:
    """For ``type=``."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be JSON, and {text!r} is not: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object such as '{{\"key\": 1}}', not {text!r}")
    return value
