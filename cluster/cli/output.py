"""How results are written: text as it comes, text when it is done, or JSON lines.

Results go to standard output and everything else to standard error. What is drawn there is
drawn only on a terminal.
"""

import io
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from outrider.speculation.request import Completion, TokenLogprobs
from outrider.speculation.statistics import SpeculationStatistics

SHOW_AFTER_S = 1.0
"""A bar for less than this would only flicker."""

_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n\r"}
_VISIBLE |= dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)
"""A terminal obeys control characters, and a text may hold any."""


class Output:
    """Writes the choices of several prompts, one after the other.

    total: how many choices will come. as_json: one object per line.
    stream: whether text appears as it comes. That, and the line of figures, is for people.
    """

    def __init__(self, *, total: int, as_json: bool, one_choice: bool) -> None:
        self._on_terminal = sys.stdout is not None and sys.stdout.isatty()
        self.stream = self._on_terminal and one_choice and not as_json
        self._as_json = as_json
        # Whatever a model writes can be printed, also where the encoding is a small one.
        self._ascii = not str(getattr(sys.stdout, "encoding", None)).lower().startswith("utf")
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        self._labels = total > 1 and not as_json
        self._bar = Bar("generating", total)

    def begin(self, prompt_number: int, choice: int) -> None:
        """Tells results apart where there are several."""
        if self._labels and self.stream:
            _label(prompt_number, choice)

    def piece(self, text: str) -> None:
        """What a step added to a streamed choice."""
        print(text.translate(_VISIBLE), end="", flush=True)

    def progress(self, choices: float) -> None:
        """How many choices are done; one that is half as long as it may be counts half."""
        self._bar.show(choices)

    def end(
        self, prompt_number: int, prompt: str, seed: int | None, done: Completion, seconds: float
    ) -> None:
        """Writes, or completes, one result."""
        self._bar.close()
        if self._as_json:
            print(json.dumps(_row(prompt, seed, done), ensure_ascii=self._ascii), flush=True)
            return
        if self._labels and not self.stream:
            _label(prompt_number, done.index)
        text = "" if self.stream else done.text
        print(text.translate(_VISIBLE) if self._on_terminal else text, flush=True)
        if self._on_terminal:
            console = Console(stderr=True)
            console.print(Text(figures(done.stats, seconds), style="dim"), soft_wrap=True)

    def close(self) -> None:
        """Clears what was only drawn."""
        self._bar.close()


class Bar:
    """Progress on standard error, drawn on a terminal once it has lasted; ``what`` is going on.

    timed: whether it says how long the rest will take.
    """

    def __init__(self, what: str, total: int, *, timed: bool = False) -> None:
        console = Console(stderr=True)
        self._wanted = sys.stderr is not None and sys.stderr.isatty() and console.is_interactive
        self._began = time.monotonic()
        columns = (
            TextColumn(what),
            BarColumn(),
            TaskProgressColumn(),
            *((TimeRemainingColumn(),) if timed else ()),
            TextColumn("{task.description}"),
        )
        # Redirection, rich's default, would send results from standard output to standard error.
        self._progress = Progress(
            *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._task = self._progress.add_task("", total=total)

    def show(self, done: float, note: str = "") -> None:
        """How many are done, and a word on them."""
        if self._wanted and time.monotonic() - self._began > SHOW_AFTER_S:
            self._progress.start()
            self._progress.update(self._task, completed=done, description=note)

    def close(self) -> None:
        """Leaves the screen to a result; the next ``show`` draws the bar again."""
        if self._wanted:
            self._progress.stop()


@contextmanager
def notice(text: str) -> Iterator[None]:
    """A line on a terminal while something takes its time.

    Nothing moves in it: downloads draw bars of their own meanwhile.
    """
    shown = sys.stderr is not None and sys.stderr.isatty()
    if shown:
        print(text, end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print(" " * len(text), end="\r", file=sys.stderr, flush=True)


def print_rows(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A drawn table on a terminal, aligned text elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    print(title + "\n")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def figures(stats: SpeculationStatistics, seconds: float) -> str:
    """One line on what a result cost; seconds: from its prompt to its last token."""
    tokens = stats.num_output_tokens
    line = f"{tokens} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s"
    if not stats.num_spec_steps:
        return f"{line}; no speculation"
    if not stats.num_drafts:
        return f"{line}; drafting did not pay"
    return (
        f"{line}; mean acceptance length {stats.mean_acceptance_length:.2f}, "
        f"acceptance rate {stats.draft_acceptance_rate:.0%}"
    )


def _label(prompt_number: int, choice: int) -> None:
    print(f"== prompt {prompt_number}, choice {choice} ==", file=sys.stderr, flush=True)


def _row(prompt: str, seed: int | None, done: Completion) -> dict[str, object]:
    row: dict[str, object] = {
        "prompt": prompt,
        "index": done.index,
        "text": done.text,
        "token_ids": done.token_ids,
        "finish_reason": done.finish_reason,
        "stop_reason": done.stop_reason,
        "seed": seed,
        "stats": done.stats.as_dict(),
    }
    for name, entries in (("logprobs", done.logprobs), ("prompt_logprobs", done.prompt_logprobs)):
        if entries is not None:
            row[name] = [None if each is None else _logprobs(each) for each in entries]
    return row


def _logprobs(entry: TokenLogprobs) -> dict[str, object]:
    return {
        "token_id": entry.token_id,
        "logprob": entry.logprob,
        "rank": entry.rank,
        "top": list(zip(entry.top_ids, entry.top_logprobs, strict=True)),
    }
