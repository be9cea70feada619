"""A trace file read back as the story of one request: its steps, and what everybody did meanwhile.

Seconds begin with the request's first step.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outrider.cluster.seeing.chrome import LOCAL_DRAFTER, TARGET, VERSION
from outrider.speculation.errors import InvalidConfigError

ROOT = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A drafted token. chosen: what the target itself takes behind it."""

    text: str
    parent: int
    score: float
    accepted: bool = False
    chosen: str = ""


@dataclass(slots=True, kw_only=True)
class Step:
    """A step of the request.

    tree: what was verified, parents first. late: some of the nodes that came too late to be placed,
    of ``num_late``. committed: the step's texts, the first ``num_accepted`` of which were drafted.
    own: the target's token after the accepted path; it is left out where the request ended before it.
    only_cached: the step took in text and verified nothing.
    """

    number: int
    began: float
    ended: float
    rows: int
    position: int
    root: str = ""
    tree: list[Node] = field(default_factory=list)
    own: str = ""
    committed: list[str] = field(default_factory=list)
    num_accepted: int = 0
    late: list[Node] = field(default_factory=list)
    num_late: int = 0
    finish_reason: str = ""
    only_cached: bool = False


@dataclass(frozen=True, slots=True)
class Block:
    """Something that took its time. kind: ``forward``, ``draft``, ``wait`` or ``reconcile``.

    step: of the request's own, if it belongs to one.
    """

    kind: str
    began: float
    ended: float
    title: str
    ours: bool
    step: int | None = None


@dataclass(slots=True)
class Lane:
    """The target's, or a drafter's."""

    name: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Arrow:
    """kind: ``commit`` or ``growth``. drafter: index of its lane among the drafters'."""

    kind: str
    drafter: int
    left: float
    arrived: float


@dataclass(slots=True, kw_only=True)
class Story:
    """One request. requests: all of the trace. dropped: events that the trace has lost."""

    request: str
    requests: list[str]
    prompt: str
    settings: str
    steps: list[Step]
    target: Lane
    drafters: list[Lane]
    arrows: list[Arrow]
    seconds: float
    dropped: int


def read_story(file: str, request: str | None = None) -> Story:
    """The story of a request, by default of the first.

    Raises:
        InvalidConfigError: the file cannot be read, is no trace of ours, or has no such request.
    """
    try:
        data = json.loads(Path(file).read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"it is not JSON ({error})"
        raise InvalidConfigError(f"the trace {file!r} cannot be read: {reason}") from error
    about = data.get("otherData") if isinstance(data, dict) else None
    if not isinstance(about, dict) or about.get("outrider_trace") != VERSION:
        raise InvalidConfigError(f"{file!r} is not a trace that 'outrider generate --trace' wrote")
    try:
        return _chosen(data, request)
    except InvalidConfigError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise InvalidConfigError(f"the trace {file!r} is damaged ({what})") from error


def _chosen(data: dict[str, Any], request: str | None) -> Story:
    requests = [each["id"] for each in data["otherData"]["requests"]]
    if not requests:
        raise InvalidConfigError("the trace has no requests")
    chosen = requests[0] if request is None else request
    if chosen not in requests:
        raise InvalidConfigError(f"the trace has no request {chosen!r}; it has {', '.join(requests)}")
    return _Reader(data, chosen).story(requests)


class _Reader:
    """Picks one request's story out of a trace."""

    def __init__(self, data: dict[str, Any], request: str) -> None:
        self._about, self._request = data["otherData"], request
        self._texts: dict[str, str] = self._about["texts"]
        self._events: list[dict[str, Any]] = data["traceEvents"]
        own = [each for each in self._events if each.get("cat") == "request" and self._is_ours(each)]
        self._began = min(each["ts"] for each in own)
        self._ended = max(each["ts"] + each["dur"] for each in own)
        self._own = own
        self._places: dict[tuple[int, int], tuple[int, int]] = {}
        """Step and index of late nodes, by their worker and id."""

    def story(self, requests: list[str]) -> Story:
        about = next(each for each in self._about["requests"] if each["id"] == self._request)
        steps = self._steps(about["prompt_token_ids"])
        self._add_late(steps)
        names = {each["pid"]: each["args"]["name"] for each in self._events if each["name"] == "process_name"}
        pids = [pid for pid in names if pid == LOCAL_DRAFTER or pid >= 10]
        return Story(
            request=self._request,
            requests=requests,
            prompt=self._text(about["prompt_token_ids"]),
            settings=f"seed {about['seed']}, temperature {about['temperature']:g}, choice {about['choice']}",
            steps=steps,
            target=Lane("target", self._blocks(TARGET)),
            drafters=[Lane(names[pid], self._blocks(pid)) for pid in pids],
            arrows=self._arrows(pids),
            seconds=self._seconds(self._ended),
            dropped=self._about["dropped_events"],
        )

    def _steps(self, prompt: list[int]) -> list[Step]:
        steps, last = [], prompt[-1]
        for event in self._own:
            step = self._step(event, self._texts[str(last)])
            steps.append(step)
            last = (event["args"].get("committed") or [last])[-1]
        return steps

    def _step(self, event: dict[str, Any], root: str) -> Step:
        args = event["args"]
        step = Step(
            number=args["step"],
            began=self._seconds(event["ts"]),
            ended=self._seconds(event["ts"] + event["dur"]),
            rows=args["rows"],
            position=args["position"],
            root=root,
            only_cached="tree" not in args,
        )
        if not step.only_cached:
            chosen = [self._texts[str(token)] for token in args["chosen"]]
            accepted = args["accepted"]
            step.tree = self._nodes(args["tree"], set(accepted), chosen[1:])
            step.committed = [self._texts[str(token)] for token in args["committed"]]
            step.num_accepted = min(len(accepted), len(step.committed))
            if len(step.committed) > len(accepted):
                step.own = step.committed[-1]
            step.finish_reason = args.get("finish_reason", "")
        return step

    def _nodes(self, tree: dict[str, Any], accepted: set[int], chosen: Iterable[str]) -> list[Node]:
        columns = zip(tree["tokens"], tree["parents"], tree["scores"], chosen, strict=True)
        return [
            Node(
                text=self._texts[str(token)], parent=parent, score=score, accepted=at in accepted, chosen=own
            )
            for at, (token, parent, score, own) in enumerate(columns)
        ]

    def _add_late(self, steps: list[Step]) -> None:
        """Gives each step the growth that was taken in before it and had come too late."""
        for event in self._events:
            args = event.get("args", {})
            if "late" not in args or args["request"] != self._request:
                continue
            taken = self._seconds(args["taken_in"])
            step = next((each for each in steps if taken <= each.ended), None)
            if step is not None:
                step.num_late += args["late_nodes"]
                late = args["late"]
                # A node whose parent is not shown stands at the left, as those below the root.
                for name in zip(late["ids"], late["tokens"], late["parents"], late["scores"], strict=True):
                    self._add_late_node(step, event["pid"], *name)

    def _add_late_node(
        self, step: Step, pid: int, number: int, token: int, parent: int, score: float
    ) -> None:
        above = self._places.get((pid, parent), (-1, ROOT))
        self._places[pid, number] = step.number, len(step.late)
        index = above[1] if above[0] == step.number else ROOT
        step.late.append(Node(text=self._texts[str(token)], parent=index, score=score))

    def _blocks(self, pid: int) -> list[Block]:
        numbers = {each["args"]["step"] for each in self._own}
        blocks = []
        for event in self._events:
            if event["ph"] != "X" or event["pid"] != pid or event["cat"] == "step":
                continue
            if event["ts"] + event["dur"] < self._began or event["ts"] > self._ended:
                continue
            args = event["args"]
            step = args.get("step")
            ours = step in numbers if step is not None else self._is_ours(event)
            began, ended = self._seconds(event["ts"]), self._seconds(event["ts"] + event["dur"])
            blocks.append(Block(event["cat"], began, ended, _title(event), ours, step if ours else None))
        return blocks

    def _arrows(self, pids: list[int]) -> list[Arrow]:
        starts = {each["id"]: each for each in self._events if each["ph"] == "s"}
        arrows = []
        for end in (each for each in self._events if each["ph"] == "f"):
            start = starts[end["id"]]
            drafter = pids.index(max(start["pid"], end["pid"]))
            left, arrived = start["ts"], end["ts"]
            if self._is_ours(end) and self._began <= left and arrived <= self._ended:
                arrows.append(Arrow(end["cat"], drafter, self._seconds(left), self._seconds(arrived)))
        return arrows

    def _is_ours(self, event: dict[str, Any]) -> bool:
        args = event["args"]
        return self._request in args.get("request_ids", [args.get("request", self._request)])

    def _text(self, tokens: list[int]) -> str:
        return "".join(self._texts[str(token)] for token in tokens)

    def _seconds(self, microseconds: float) -> float:
        return round(float(microseconds - self._began) * 1e-6, 9)


def _title(event: dict[str, Any]) -> str:
    """What a block tells whoever points at it."""
    args = event["args"]
    if event["cat"] == "forward":
        what = f"step {args['step']}: forward of {args['rows']} rows for {args['requests']} request(s)"
    elif "nodes" in args:
        late = f", {args['late_nodes']} too late" if "late_nodes" in args else ""
        what = f"{event['name']}: {args['rows']} rows, {args['nodes']} nodes grown{late}"
    elif event["cat"] == "draft":
        what = f"draft step of {args['rows']} rows"
    else:
        what = event["name"]
    return f"{what}, {event['dur'] / 1e3:.2f} ms"
