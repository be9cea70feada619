"""A job's output file, and the file beside it that says what job it is: what resuming stands on."""

import fcntl
import json
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from outrider.cluster.batch_files.lines import Answers
from outrider.cluster.given_files import writing
from outrider.speculation.errors import InvalidConfigError

Settings: TypeAlias = dict[str, Any]
"""Everything that the answers depend on, by name; JSON values."""


@dataclass(slots=True)
class Earlier:
    """What was answered before. done: a byte per line of the input."""

    rows: int = 0
    failed: int = 0
    done: bytearray = field(default_factory=bytearray)

    def note(self, line: int, *, failed: bool) -> None:
        """A line has been answered."""
        self.done.extend(bytes(max(0, line + 1 - len(self.done))))
        self.done[line] = 1
        self.rows += 1
        self.failed += failed

    def has(self, line: int) -> bool:
        """Whether a line has been answered."""
        return line < len(self.done) and bool(self.done[line])


class ResultFile:
    """Takes answers, each with one write, so that whatever ends the process costs none that was taken.

    ``require`` and ``begin`` come before the first answer. No other process can use the file meanwhile.
    """

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        """
        Raises:
            InvalidConfigError: it cannot be written or is in use, or it holds something that is no job's.
        """
        self.path = path
        self._state_path = path.with_name(path.name + ".state")
        self._descriptor = _opened(path)
        self._settings: Settings | None
        """Of the job to resume."""
        try:
            new = overwrite or os.fstat(self._descriptor).st_size == 0
            self._job, self._settings = (secrets.token_hex(6), None) if new else self._recorded()
        except BaseException:
            self.close()
            raise
        self.answers = Answers(self._job)

    def require(self, settings: Settings) -> None:
        """
        Raises:
            InvalidConfigError: what is to be resumed had other settings than these.
        """
        if self._settings is None:
            return
        for name, value in settings.items():
            before = self._settings.get(name)
            if before != value:
                raise InvalidConfigError(
                    f"{self.path} cannot be resumed: {name} was {before} and is {value} now; "
                    "--overwrite begins anew"
                )

    def begin(self, settings: Settings) -> Earlier:
        """Records a new job, or finds what was answered before and cuts off a line that was not finished.

        Raises:
            InvalidConfigError: as for ``require``, or a line is no answer of this job.
        """
        self.require(settings)
        if self._settings is None:
            os.ftruncate(self._descriptor, 0)
            _replace(self._state_path, json.dumps({"job": self._job, "settings": settings}, indent=2))
            return Earlier()
        earlier, end = Earlier(), 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    answered, failed = self.answers.line_of(line)
                except (ValueError, KeyError, RecursionError):
                    raise InvalidConfigError(
                        f"{self.path} cannot be resumed: its line {number} is no answer of this job; "
                        "--overwrite begins anew"
                    ) from None
                earlier.note(answered, failed=failed)
                end += len(line)
        os.ftruncate(self._descriptor, end)
        return earlier

    def write(self, answer: bytes) -> None:
        """Appends an answer; it is in the file when this returns."""
        left = memoryview(answer)
        while left:
            left = left[os.write(self._descriptor, left) :]

    def close(self) -> None:
        """Leaves the file to others."""
        os.close(self._descriptor)

    def _recorded(self) -> tuple[str, Settings]:
        """Name and settings of the job that the file holds."""
        try:
            state = json.loads(self._state_path.read_text(encoding="utf-8"))
            return str(state["job"]), dict(state["settings"])
        except FileNotFoundError:
            problem = f"there is no {self._state_path.name} beside it"
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"{self._state_path.name} cannot be read: {error}"
        raise InvalidConfigError(
            f"output {str(self.path)!r} exists and cannot be resumed: {problem}; --overwrite begins anew"
        )


def _opened(path: Path) -> int:
    with writing(f"output {str(path)!r}"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidConfigError(f"output {str(path)!r} must be a regular file")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InvalidConfigError(f"output {str(path)!r} is in use by another process") from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _replace(path: Path, text: str) -> None:
    """Whenever this is interrupted there is the old file or the new one."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
