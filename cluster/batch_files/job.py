"""A batch job: from the lines of one file to the lines of another, whoever generates the text."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from outrider.cluster.api.calls import Call
from outrider.cluster.api.choices import Choices
from outrider.cluster.api.fields import GenerationBody, Speculative
from outrider.cluster.api.refusals import Refusal, refusal_of, refusal_of_body
from outrider.cluster.api.service import OfferedModel, unknown_model
from outrider.cluster.batch_files.lines import InputFile, LineError, Question, parse
from outrider.cluster.batch_files.report import Report
from outrider.cluster.batch_files.results import Earlier, ResultFile
from outrider.cluster.generation import TextGenerator
from outrider.speculation.errors import OutriderError
from outrider.speculation.request import Completion, Request

log = logging.getLogger(__name__)


class TooManyErrorsError(OutriderError):
    """More rows have failed than the job may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """seed: from which those of rows are made that bring none. speculative: whether drafts are verified.

    keep_order: answers come in the order of the questions. max_errors: rows that may fail, or any number.
    """

    seed: int
    speculative: bool = True
    keep_order: bool = False
    max_errors: int | None = None


@dataclass(slots=True, eq=False)
class Slot:
    """The place of a line's answer in the output."""

    line: int
    answer: bytes | None = None


@dataclass(slots=True, eq=False)
class Row:
    """A line whose requests are being served. left: requests without a result."""

    slot: Slot
    custom_id: str
    body: GenerationBody
    choices: Choices
    left: int
    error: OutriderError | None = None


class BatchJob:
    """Serves the lines that have no answer yet. on_answer: told after each answer.

    In memory are the rows being served, with ``keep_order`` also those that finished before an earlier
    one, and for every line 16 bytes that stand for its custom_id.
    """

    def __init__(
        self,
        generator: TextGenerator,
        model: OfferedModel,
        source: InputFile,
        results: ResultFile,
        earlier: Earlier,
        options: JobOptions,
        on_answer: Callable[[Report], None],
    ) -> None:
        self._generator, self._model, self._source, self._results = generator, model, source, results
        self._earlier, self._options, self._on_answer = earlier, options, on_answer
        self.report = Report(rows=earlier.rows, failed=earlier.failed, earlier=earlier.rows)
        self._began = time.monotonic()
        self._custom_ids: set[bytes] = set()
        self._places: dict[Request, tuple[Row, int]] = {}
        self._slots: deque[Slot] = deque()
        """In order, the first without an answer; empty unless the order is kept."""

    def run(self) -> None:
        """Until every line has its answer.

        Raises:
            TooManyErrorsError: more rows failed than may.
            OutriderError: what ended the generator.
        """
        with closing(self._generator.complete_unordered(self._requests())) as results:
            for request, result in results:
                row, index = self._places.pop(request)
                self._take(row, index, result)

    def _requests(self) -> Iterator[Request]:
        """Those of all lines; a line is read once there is room for the first of its requests."""
        for number, line in self._source:
            yield from self._asked(number, line)

    def _asked(self, number: int, line: bytes) -> list[Request]:
        """What a line asks of the generator: nothing, where its answer is known already."""
        question = self._read(line)
        if self._earlier.has(number):
            return []
        slot = self._slot(number)
        if isinstance(question, LineError):
            self._answer(slot, self._results.answers.problem(number, question), failed=True)
            return []
        try:
            body = self._settled(question)
            call = self._model.call(body)
        # Whatever is wrong with a row, the job goes on; and it would come to it again when resumed.
        except Exception as error:
            self._refuse(slot, question.custom_id, _refusal(error))
            return []
        self._open(slot, question.custom_id, body, call)
        return call.requests

    def _read(self, line: bytes) -> Question | LineError:
        """The question, or why it is none; its custom_id is taken from then on."""
        try:
            question = parse(line)
        except LineError as error:
            return error
        if question.key in self._custom_ids:
            message = f"custom_id {question.custom_id!r} stands in an earlier line"
            return LineError("duplicate_custom_id", message, question.custom_id)
        self._custom_ids.add(question.key)
        return question

    def _settled(self, question: Question) -> GenerationBody:
        """The body as it is served: with a seed, and without drafts where there are to be none."""
        body = question.body()
        names = self._model.settings.names
        if body.model is not None and body.model not in names:
            raise unknown_model(body.model, names)
        update: dict[str, Any] = {}
        if body.seed is None:
            update["seed"] = question.seed(self._options.seed)
        if not self._options.speculative:
            update["speculative"] = Speculative(enabled=False)
        return body.model_copy(update=update)

    def _open(self, slot: Slot, custom_id: str, body: GenerationBody, call: Call) -> None:
        row = Row(slot, custom_id, body, Choices(call), len(call.requests))
        for index, request in enumerate(call.requests):
            self._places[request] = row, index

    def _take(self, row: Row, index: int, result: Completion | OutriderError) -> None:
        """The result of one of a row's requests; the row is answered with the last."""
        row.left -= 1
        if isinstance(result, OutriderError):
            row.error = result
        else:
            row.choices.complete(index, result)
        if row.left:
            return
        if row.error is not None:
            self._refuse(row.slot, row.custom_id, refusal_of(row.error))
            return
        reply = self._model.format(row.body, row.choices).whole()
        self.report.add(row.choices.usage)
        answer = self._results.answers.reply(row.slot.line, row.custom_id, reply)
        self._answer(row.slot, answer, failed=False)

    def _refuse(self, slot: Slot, custom_id: str, refusal: Refusal) -> None:
        answer = self._results.answers.refusal(slot.line, custom_id, refusal)
        self._answer(slot, answer, failed=True)

    def _slot(self, line: int) -> Slot:
        slot = Slot(line)
        if self._options.keep_order:
            self._slots.append(slot)
        return slot

    def _answer(self, slot: Slot, answer: bytes, *, failed: bool) -> None:
        """Writes an answer, or, where the order is kept, all that are due now."""
        slot.answer = answer
        if not self._options.keep_order:
            self._results.write(answer)
        while self._slots and self._slots[0].answer is not None:
            self._results.write(self._slots.popleft().answer or b"")
        self.report.rows += 1
        self.report.failed += failed
        self.report.seconds = time.monotonic() - self._began
        self._on_answer(self.report)
        most = self._options.max_errors
        if failed and most is not None and self.report.failed > most:
            raise TooManyErrorsError(f"{self.report.failed} rows have failed, more than {most}")


def _refusal(error: Exception) -> Refusal:
    """For a body that is not served."""
    if isinstance(error, ValidationError):
        return refusal_of_body([dict(each) for each in error.errors()])
    if not isinstance(error, OutriderError):
        log.error("a row could not be prepared", exc_info=error)
    return refusal_of(error)
