"""The files that a run leaves for those who want to see where the time went."""

import json
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from outrider.cluster.given_files import writing
from outrider.cluster.seeing.chrome import ChromeTrace
from outrider.cluster.seeing.events import Event, EventLog
from outrider.cluster.seeing.recording import Recorder
from outrider.models.tokenizer import Tokenizer
from outrider.speculation.errors import InvalidConfigError

MAX_EVENTS = 100_000
"""Events that a trace keeps, the last ones; a step of the target brings one to about twenty."""


class Seeing:
    """A run's event log, and where its events go. Leaving its ``with`` block closes the files.

    trace_file, record_file: where they go; None: nowhere. drafting: see ``Recorder``.

    Raises:
        InvalidConfigError: a file cannot be written, or both are one.
    """

    def __init__(self, trace_file: str | None, record_file: str | None, *, drafting: str) -> None:
        if trace_file is not None and record_file is not None and Path(trace_file) == Path(record_file):
            raise InvalidConfigError(f"trace and record must be two files, not {trace_file!r} twice")
        # Opened at once: after minutes of generating it would be too late to find out.
        self._files = ExitStack()
        self._trace = None if trace_file is None else self._open(trace_file)
        record = None if record_file is None else self._open(record_file)
        self._recorder = None if record is None else Recorder(record, drafting=drafting)
        self._kept: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._num_events = 0
        self.log = EventLog(self._take)

    @contextmanager
    def writing(self, tokenizer: Tokenizer) -> Iterator[None]:
        """Writes everything when the block ends, however it ends; on the engine's thread."""
        try:
            yield
        finally:
            self.log.flush()
            if self._trace is not None:
                dropped = self._num_events - len(self._kept)
                trace = ChromeTrace(list(self._kept), token_text(tokenizer), dropped=dropped)
                json.dump(trace.as_dict(), self._trace, separators=(",", ":"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def _open(self, file: str) -> TextIO:
        try:
            with writing(repr(file)):
                return self._files.enter_context(Path(file).open("w", encoding="utf-8"))
        except InvalidConfigError:
            self._files.close()
            raise

    def _take(self, events: list[Event]) -> None:
        if self._recorder is not None:
            self._recorder.feed(events)
        if self._trace is not None:
            self._num_events += len(events)
            self._kept.extend(events)


def token_text(tokenizer: Tokenizer) -> Callable[[int], str]:
    """The text of single tokens, as it is within a text.

    A token that has none by itself is shown as its id in angle brackets.
    """

    def text_of(token: int) -> str:
        alone = tokenizer.decode([token], skip_special_tokens=False)
        # Some tokenizers leave out a space at the beginning of a text.
        twice = tokenizer.decode([token, token], skip_special_tokens=False)
        return twice[len(alone) :] or alone or f"<{token}>"

    return text_of
