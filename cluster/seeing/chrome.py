"""Events as a trace in Chrome's format, which ui.perfetto.dev and chrome://tracing open.

Lanes: the target, every drafter, and every request, whose steps carry their draft trees. Arrows go
from commits to the draft steps that heeded them, and from growth to where it was taken in.
Format: "Trace Event Format" (Google, 2016), JSON object form; times in microseconds.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from outrider.actors.tracing import Span
from outrider.cluster.seeing.drafters import Drafters, Grown
from outrider.cluster.seeing.events import Drafted, Event, Judged, Sent, Stepped, TookGrowth, Waited
from outrider.speculation.request import Request

VERSION = 1
TARGET, LOCAL_DRAFTER, REQUESTS, FIRST_WORKER = 1, 2, 3, 10
"""Process ids of the lanes; workers have one each from the last on."""

LATE_SHOWN = 8
"""Most nodes of a message that are kept although they came too late: these are the many."""

Decode = Callable[[int], str]
"""A token's text."""
Args = dict[str, Any]


class ChromeTrace:
    """Makes the trace of all events of a run.

    decode: texts of tokens, which are kept once each. dropped: events that the run had before these.
    """

    def __init__(self, events: Sequence[Event], decode: Decode, *, dropped: int = 0) -> None:
        self._events, self._decode, self._dropped = events, decode, dropped
        self._texts: dict[int, str] = {}
        self._requests: dict[str, Request] = {}
        self._threads: dict[str, int] = {}
        self._drafters = Drafters()
        self._drafters.feed(events)
        self._drafters.settle()
        self._lanes = {address: FIRST_WORKER + at for at, address in enumerate(self._addresses())}
        began = [each.began for each in self._drafters.grown]
        began += [
            each.span[0] for each in events if isinstance(each, Stepped | Drafted | TookGrowth | Waited)
        ]
        began += [each.at for each in events if isinstance(each, Sent)]
        self._origin = min(began, default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """The whole trace, ready for JSON."""
        events = [*self._target_events(), *self._worker_events(), *self._arrows()]
        return {
            "displayTimeUnit": "ms",
            "otherData": {
                "outrider_trace": VERSION,
                "dropped_events": self._dropped,
                "requests": [self._about(request) for request in self._requests.values()],
                "texts": {str(token): text for token, text in sorted(self._texts.items())},
            },
            "traceEvents": [*self._names(), *sorted(events, key=lambda event: event["ts"])],
        }

    def _target_events(self) -> Iterator[Args]:
        number = 0
        for event in self._events:
            if isinstance(event, Stepped):
                yield from self._step(event, number)
                number += 1
            elif isinstance(event, Drafted):
                args = {"request_ids": [each.request_id for each in event.requests], "rows": sum(event.rows)}
                yield self._slice("draft step", "draft", LOCAL_DRAFTER, 1, event.span, args)
            elif isinstance(event, TookGrowth):
                yield self._slice("take growth in", "reconcile", TARGET, 1, event.span, {})
            elif isinstance(event, Waited):
                args = {"request_ids": [each.request_id for each in event.requests]}
                yield self._slice("wait for drafters", "wait", TARGET, 1, event.span, args)

    def _step(self, event: Stepped, number: int) -> Iterator[Args]:
        rows = sum(part.rows for part in event.parts)
        about = {"step": number, "requests": len(event.parts), "rows": rows}
        yield self._slice(f"step {number}", "step", TARGET, 1, event.span, about)
        yield self._slice("forward", "forward", TARGET, 1, event.forward, about)
        for part in event.parts:
            yield self._part(part, event, number)

    def _part(self, part: Judged, event: Stepped, number: int) -> Args:
        request = part.request.request_id
        self._requests.setdefault(request, part.request)
        lane = self._threads.setdefault(request, len(self._requests))
        args = {"request": request, "step": number, "position": part.position, "rows": part.rows}
        if part.tree is None or part.tokens is None or part.verdict is None or part.output is None:
            return self._slice("cache text", "request", REQUESTS, lane, event.span, args)
        tree, committed = part.tree, part.output.token_ids
        args |= {
            "tree": {
                "tokens": self._known(tree.tokens.tolist()),
                "parents": tree.parent_indices.tolist(),
                "scores": _rounded(tree.scores.tolist()),
            },
            "chosen": self._known(part.tokens.tolist()),
            "accepted": part.verdict.accepted.tolist(),
            "committed": self._known(committed),
            "text": "".join(self._texts[token] for token in committed),
        }
        if part.output.finish_reason is not None:
            args["finish_reason"] = str(part.output.finish_reason)
        name = f"{part.output.num_accepted} of {len(tree)} accepted" if len(tree) else "nothing drafted"
        return self._slice(name, "request", REQUESTS, lane, event.span, args)

    def _worker_events(self) -> Iterator[Args]:
        for grown in self._drafters.grown:
            if grown.growth.draft_steps or len(grown.growth.tokens):
                growth = grown.growth
                name = "draft step" if growth.draft_steps == 1 else f"{growth.draft_steps} draft steps"
                args = {
                    "request": grown.request_id,
                    "steps": growth.draft_steps,
                    "rows": growth.draft_rows,
                    "nodes": len(growth.tokens),
                    "taken_in": self._microseconds(grown.arrived),
                }
                if any(grown.late):
                    args |= {"late_nodes": sum(grown.late), "late": self._late(grown)}
                span = grown.began, grown.ended
                yield self._slice(name, "draft", self._lanes[grown.address], 1, span, args)

    def _late(self, grown: Grown) -> Args:
        """The first nodes that came too late, with ids and parents' ids; scores are given the parent."""
        growth = grown.growth
        nodes = [node for node, late in enumerate(grown.late) if late][:LATE_SHOWN]
        return {
            "ids": [growth.first_id + node for node in nodes],
            "tokens": self._known(growth.tokens[nodes].tolist()),
            "parents": growth.parents[nodes].tolist(),
            "scores": _rounded(growth.scores[nodes].tolist()),
        }

    def _arrows(self) -> Iterator[Args]:
        number = 0
        for commit in self._drafters.commits:
            grown = commit.heeded
            lane = self._lanes[grown.address]
            about = {"request": grown.request_id}
            yield self._arrow("s", number, "commit", TARGET, commit.at, about)
            yield self._arrow("f", number, "commit", lane, max(grown.began, commit.at), about)
            number += 1
        for grown in self._drafters.grown:
            if len(grown.growth.tokens):
                # Inside its block: at its very end no viewer finds the block that it belongs to.
                sent = grown.ended - min(1e-6, grown.ended - grown.began)
                about = {"request": grown.request_id}
                yield self._arrow("s", number, "growth", self._lanes[grown.address], sent, about)
                yield self._arrow("f", number, "growth", TARGET, grown.arrived, about)
                number += 1

    def _names(self) -> Iterator[Args]:
        yield from _named(TARGET, 0, "target")
        if any(isinstance(event, Drafted) for event in self._events):
            yield from _named(LOCAL_DRAFTER, 1, "drafter in the target's process")
        for address, lane in self._lanes.items():
            name = self._drafters.names.get(address, "unnamed")
            yield from _named(lane, lane, f"draft worker {name} at {address}")
        yield from _named(REQUESTS, 1000, "requests")
        for request, lane in self._threads.items():
            args = {"name": f"request {request}"}
            yield {"ph": "M", "name": "thread_name", "pid": REQUESTS, "tid": lane, "args": args}

    def _about(self, request: Request) -> Args:
        prompt = self._known(request.prompt_ids.tolist())
        return {
            "id": request.request_id,
            "choice": request.choice,
            "seed": request.params.seed,
            "temperature": request.params.temperature,
            "prompt_token_ids": prompt,
        }

    def _addresses(self) -> list[str]:
        spoken_to = (event.address for event in self._events if isinstance(event, Sent))
        return list(dict.fromkeys(spoken_to))

    def _known(self, tokens: list[int]) -> list[int]:
        for token in tokens:
            if token not in self._texts:
                self._texts[token] = self._decode(token)
        return tokens

    def _slice(self, name: str, kind: str, lane: int, thread: int, span: Span, args: Args) -> Args:
        began = self._microseconds(span[0])
        took = round(self._microseconds(span[1]) - began, 3)
        place = {"pid": lane, "tid": thread, "ts": began, "dur": took}
        return {"ph": "X", "name": name, "cat": kind, **place, "args": args}

    def _arrow(self, end: str, number: int, kind: str, lane: int, at: float, about: Args) -> Args:
        place = {"pid": lane, "tid": 1, "ts": self._microseconds(at)}
        binding = {"bp": "e"} if end == "f" else {}
        return {"ph": end, "id": number, "name": kind, "cat": kind, **place, **binding, "args": about}

    def _microseconds(self, at: float) -> float:
        return round((at - self._origin) * 1e6, 3)


def _named(process: int, order: int, name: str) -> Iterator[Args]:
    yield {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "args": {"sort_index": order}}


def _rounded(scores: list[float]) -> list[float]:
    return [round(score, 4) for score in scores]
