"""Recordings: one line of JSON for every target step and request, and reading them back."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from outrider.cluster.seeing.drafters import Drafters
from outrider.cluster.seeing.events import Drafted, Event, Judged, Sent, Stepped, Waited
from outrider.speculation.errors import InvalidConfigError
from outrider.speculation.replay import RecordedStep
from outrider.speculation.replication.messages import Close
from outrider.speculation.tree import DraftTree, Law

VERSION = 1


@dataclass(slots=True)
class _Meanwhile:
    """What happened for a request since its last step. round_trip: see ``Recorder``."""

    draft_steps: int = 0
    draft_seconds: float = 0.0
    wait_seconds: float = 0.0
    round_trip: float | None = None


class Recorder:
    """Writes what it is fed, one line per target step and request.

    drafting: ``none``, ``local``, ``serial``, ``parallel`` or ``pearl``.

    A round trip is the time from a commit's sending until the first growth was taken in that had
    seen it, without its draft steps.
    """

    def __init__(self, file: TextIO, *, drafting: str) -> None:
        self._file, self._drafters = file, Drafters()
        self._meanwhile: dict[str, _Meanwhile] = {}
        self._num_steps = 0
        self._write({"outrider_recording": VERSION, "drafting": drafting})

    def feed(self, events: Iterable[Event]) -> None:
        """Takes in what happened next."""
        for event in events:
            if isinstance(event, Stepped):
                self._step(event)
            elif isinstance(event, Drafted):
                self._draft(event)
            elif isinstance(event, Waited):
                for request in event.requests:
                    self._since(request.request_id).wait_seconds += event.span[1] - event.span[0]
            else:
                self._hear(event)

    def _step(self, event: Stepped) -> None:
        rows = sum(part.rows for part in event.parts)
        about = {
            "step": self._num_steps,
            "company": sum(part.tree is not None for part in event.parts),
            "rows": rows,
            "seconds": event.forward[1] - event.forward[0],
        }
        for part in event.parts:
            if part.tree is not None:
                self._write({**about, **self._part(part, part.tree)})
        self._num_steps += 1

    def _part(self, part: Judged, tree: DraftTree) -> dict[str, Any]:
        assert part.tokens is not None
        assert part.verdict is not None
        assert part.output is not None
        since = self._meanwhile.pop(part.request.request_id, _Meanwhile())
        return {
            "request": part.request.request_id,
            "position": part.position,
            "tokens": tree.tokens.tolist(),
            "parents": tree.parent_indices.tolist(),
            "scores": tree.scores.tolist(),
            "target_tokens": part.tokens.tolist(),
            "accepted": part.verdict.accepted.tolist(),
            "committed": part.output.token_ids,
            "finish_reason": part.output.finish_reason,
            "draft_steps": since.draft_steps,
            "draft_seconds": since.draft_seconds,
            "wait_seconds": since.wait_seconds,
            "round_trip": since.round_trip,
        }

    def _draft(self, event: Drafted) -> None:
        total = max(1, sum(event.rows))
        for request, rows in zip(event.requests, event.rows, strict=True):
            since = self._since(request.request_id)
            since.draft_steps += 1
            since.draft_seconds += (event.span[1] - event.span[0]) * rows / total

    def _hear(self, event: Event) -> None:
        drafters = self._drafters
        drafters.feed([event])
        for grown in drafters.grown:
            since = self._since(grown.request_id)
            since.draft_steps += grown.growth.draft_steps
            since.draft_seconds += grown.growth.draft_seconds
        for commit in drafters.commits:
            grown = commit.heeded
            trip = grown.arrived - commit.at - grown.growth.draft_seconds
            self._since(grown.request_id).round_trip = max(0.0, trip)
        drafters.grown.clear()
        drafters.commits.clear()
        if isinstance(event, Sent) and isinstance(event.message, Close):
            drafters.forget(event)

    def _since(self, request: str) -> _Meanwhile:
        return self._meanwhile.setdefault(request, _Meanwhile())

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")


@dataclass(slots=True)
class Recording:
    """A recording read back: its steps by request, in order.

    round_trips: those that are known, in seconds.
    """

    drafting: str
    requests: dict[str, list[RecordedStep]] = field(default_factory=dict)
    round_trips: list[float] = field(default_factory=list)

    @property
    def steps(self) -> list[RecordedStep]:
        """Those of all requests."""
        return [step for steps in self.requests.values() for step in steps]


def read_recording(file: str) -> Recording:
    """
    Raises:
        InvalidConfigError: the file cannot be read, or is no recording.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidConfigError(f"the recording {file!r} cannot be read: {reason}") from error
    recording = Recording(_drafting(file, lines[0] if lines else ""))
    for number, line in enumerate(lines[1:], 2):
        try:
            _add(recording, json.loads(line))
        except (LookupError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise InvalidConfigError(
                f"line {number} of the recording {file!r} is damaged ({what})"
            ) from error
    if not recording.requests:
        raise InvalidConfigError(f"the recording {file!r} has no steps")
    return recording


def _drafting(file: str, line: str) -> str:
    """How the run drafted, from a recording's first line."""
    try:
        about = json.loads(line)
    except ValueError:
        about = None
    if not isinstance(about, dict) or about.get("outrider_recording") != VERSION:
        raise InvalidConfigError(f"{file!r} is not a recording that 'outrider generate --record' wrote")
    return str(about["drafting"])


def _add(recording: Recording, line: dict[str, Any]) -> None:
    step = RecordedStep(
        position=line["position"],
        num_committed=len(line["committed"]),
        tree=DraftTree(
            tokens=np.array(line["tokens"], np.int64),
            parent_indices=np.array(line["parents"], np.int64),
            scores=np.array(line["scores"], np.float64),
            law=Law.COUPLED,
        ),
        target_tokens=np.array(line["target_tokens"], np.int64),
        company=line["company"],
        rows=line["rows"],
        seconds=line["seconds"],
        draft_steps=line["draft_steps"],
        draft_seconds=line["draft_seconds"],
    )
    if len(step.target_tokens) != len(step.tree) + 1:
        raise ValueError(f"{len(step.target_tokens)} target tokens for {len(step.tree)} nodes")
    recording.requests.setdefault(line["request"], []).append(step)
    if line["round_trip"] is not None:
        recording.round_trips.append(line["round_trip"])
