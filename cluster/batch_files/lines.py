"""Lines of batch files as OpenAI's and vLLM's batch interfaces have them: what is asked, what is answered."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any
from uuid import uuid4

from outrider.cluster.api.fields import ChatBody, CompletionBody, GenerationBody
from outrider.cluster.api.refusals import Refusal
from outrider.cluster.sampled_digest import sampled_digest
from outrider.speculation.errors import InvalidConfigError, InvalidRequestError, OutriderError

BODIES: dict[str, type[GenerationBody]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
}


class LineError(OutriderError):
    """A line asks for nothing that could be answered. custom_id: as far as it can be told."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code, self.custom_id = code, custom_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A line of the input; what its body says is not looked at yet."""

    custom_id: str
    url: str
    given: Any

    def body(self) -> GenerationBody:
        """
        Raises:
            ValidationError: it does not fit the fields.
            InvalidRequestError: it asks for what only somebody who watches can get.
        """
        body = BODIES[self.url].model_validate(self.given)
        for name in ("stream", "return_draft_tokens"):
            if getattr(body, name):
                raise InvalidRequestError(f"{name} must be false in a batch file, not true")
        return body

    @property
    def key(self) -> bytes:
        """16 bytes that stand for the custom_id where many are remembered."""
        return blake2b(_encoded(self.custom_id), digest_size=16).digest()

    def seed(self, job_seed: int) -> int:
        """Of a row that brings none: the same whenever, and beside whatever, the row is served."""
        digest = blake2b(_encoded(self.custom_id), key=job_seed.to_bytes(8, "little"), digest_size=8)
        return int.from_bytes(digest.digest(), "little") >> 1


class InputFile:
    """The lines of a file, read as they are asked for, once."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            InvalidConfigError: it is no file that can be read.
        """
        if path.exists() and not path.is_file():
            raise InvalidConfigError(f"input {str(path)!r} must be a regular file: it may be read twice")
        try:
            self.size, self.digest = path.stat().st_size, sampled_digest(path)
            self._file = path.open("rb")
        except OSError as error:
            raise InvalidConfigError(f"input {str(path)!r} cannot be read: {error.strerror}") from None
        self.read = 0
        """Bytes of it."""

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Those that are not blank, and their numbers, from 1."""
        for number, line in enumerate(self._file, 1):
            self.read += len(line)
            if line.strip():
                yield number, line

    def close(self) -> None:
        self._file.close()


def parse(line: bytes) -> Question:
    """
    Raises:
        LineError: it is no question.
    """
    try:
        # Some editors begin a file with a byte order mark.
        given = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise LineError("invalid_json", f"the line is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise LineError("invalid_json", "the line must be an object")
    custom_id = given.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise LineError("invalid_custom_id", f"custom_id must be a string, not {_short(custom_id)}")
    if given.get("method") != "POST":
        raise LineError(
            "invalid_method", f"method must be 'POST', not {_short(given.get('method'))}", custom_id
        )
    url = given.get("url")
    if not isinstance(url, str) or url not in BODIES:
        known = " or ".join(map(repr, BODIES))
        raise LineError("invalid_url", f"url must be {known}, not {_short(url)}", custom_id)
    return Question(custom_id=custom_id, url=url, given=given.get("body"))


class Answers:
    """Makes the lines of one job's output. Each line's id tells which line of the input it answers."""

    def __init__(self, job: str) -> None:
        self._prefix = f"batch_req_{job}_"

    def reply(self, line: int, custom_id: str, body: dict[str, Any]) -> bytes:
        """What was asked for."""
        return self._line(line, custom_id, _response(200, body), None)

    def refusal(self, line: int, custom_id: str, refusal: Refusal) -> bytes:
        """An error, with the response that a server would have given."""
        body = refusal.body
        error = {"code": str(body["error"]["code"]), "message": body["error"]["message"]}
        return self._line(line, custom_id, _response(refusal.status, body), error)

    def problem(self, line: int, error: LineError) -> bytes:
        """A line that no server was asked about."""
        return self._line(
            line, error.custom_id, None, {"code": error.code, "message": f"line {line}: {error}"}
        )

    def line_of(self, answer: bytes) -> tuple[int, bool]:
        """The number of the line that is answered, and whether the answer is an error.

        Raises:
            ValueError: it is no answer of this job.
        """
        given = json.loads(answer)
        number = str(given["id"]).removeprefix(self._prefix) if isinstance(given, dict) else ""
        return int(number), given["error"] is not None

    def _line(self, line: int, custom_id: str | None, response: object, error: object) -> bytes:
        answer = {
            "id": f"{self._prefix}{line}",
            "custom_id": custom_id,
            "response": response,
            "error": error,
        }
        # ASCII: texts may hold what ends a line elsewhere, or halves of characters.
        return json.dumps(answer).encode() + b"\n"


def _response(status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": uuid4().hex, "body": body}


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
