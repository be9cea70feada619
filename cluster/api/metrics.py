"""What a server counts, under vLLM's names where vLLM has the figure, and beside them Outrider's own.

Raw counts; rates and ratios are for whoever reads them. Prometheus' client adds ``_total`` to counters.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol, TypeAlias

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from outrider.cluster.api.backend import Health
from outrider.speculation.request import Completion
from outrider.speculation.statistics import SpeculationStatistics

disable_created_metrics()  # they double the exposition, and nobody reads them

LABELS = ("model_name", "engine")
ENGINE = "0"
FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0,
)  # fmt: skip
TOKEN_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0
)  # fmt: skip
REQUEST_SECONDS = (
    0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0
)  # fmt: skip

_COUNTS = {
    "num_drafts": ("vllm:spec_decode_num_drafts", "Verifications of at least one draft token"),
    "num_draft_tokens": ("vllm:spec_decode_num_draft_tokens", "Draft tokens verified"),
    "num_accepted_tokens": ("vllm:spec_decode_num_accepted_tokens", "Draft tokens accepted"),
    "preemptions": ("vllm:num_preemptions", "Requests that had to give their KV blocks back"),
    "target_steps": ("outrider_target_steps", "Target steps, counted for each request in them"),
    "target_seconds": ("outrider_target_seconds", "Time of target steps, shared among their requests"),
    "draft_seconds": ("outrider_draft_seconds", "Time of draft steps, shared among their requests"),
    "overlapped_draft_seconds": (
        "outrider_overlapped_draft_seconds",
        "Time of draft steps that target steps hid",
    ),
    "wait_seconds": ("outrider_target_bubble_seconds", "Time that the target was held back for drafters"),
    "growth_bytes": ("outrider_growth_bytes", "Bytes of draft nodes received"),
    "sent_bytes": ("outrider_sent_bytes", "Bytes sent to draft workers"),
    "stale_nodes": ("outrider_stale_nodes", "Draft nodes that arrived too late to be placed"),
    "reroot_hits": ("outrider_reroot_hits", "Commits that kept a draft tree"),
    "reroot_misses": ("outrider_reroot_misses", "Commits that lost a draft tree"),
    "drafter_failovers": ("outrider_drafter_failovers", "Requests that another draft worker went on with"),
    "drafter_moves": ("outrider_drafter_moves", "Requests that went on with a faster draft worker"),
    "cached_tokens": ("vllm:prefix_cache_hits", "Tokens that were found in the KV cache"),
}
"""Fields of ``SpeculationStatistics`` that are counters, with names and words."""


class Instrument(Protocol):
    """A counter, gauge or histogram that takes its labels with each value."""

    def add(self, value: float, labels: Mapping[str, str]) -> None: ...


Mirror: TypeAlias = Callable[[str, str, tuple[str, ...], Sequence[float] | None], Instrument]
"""Makes the counter of a name, with words and label names; a histogram where bucket bounds are given."""


class Metrics:
    """The counters of one server, in a registry of its own.

    models: the names that are served. mirror: makes what counters and histograms are repeated to.
    """

    def __init__(self, models: Sequence[str], mirror: Mirror | None = None) -> None:
        self.registry = CollectorRegistry()
        self._mirror = mirror
        self._counts = {name: self._counter(*names) for name, names in _COUNTS.items()}
        missing = set(_COUNTS) - {each.name for each in fields(SpeculationStatistics)}
        assert not missing, f"no such statistics: {missing}"
        self._per_position = self._counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens accepted at each depth",
            "position",
        )
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts")
        self._output_tokens = self._counter("vllm:generation_tokens", "Tokens generated")
        self._queries = self._counter("vllm:prefix_cache_queries", "Tokens looked up in the KV cache")
        self._finished = self._counter("vllm:request_success", "Texts finished", "finished_reason")
        self._refused = self._counter(
            "outrider_requests_refused", "Requests answered 4xx or 5xx, but for 401 and 413", "status"
        )
        self._cancelled = self._counter("outrider_requests_cancelled", "Requests whose client went away")
        self._unpaid = self._counter(
            "outrider_plain_texts", "Texts without a draft: speculation was off, or did not pay", "reason"
        )
        self._first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token", FIRST_TOKEN_SECONDS
        )
        self._between = self._histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of a text", TOKEN_SECONDS
        )
        self._whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the end", REQUEST_SECONDS
        )
        self._running = self._gauge("vllm:num_requests_running", "Requests in the targets' steps")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait for room")
        self._kv_usage = self._gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks that is held")
        self._targets = self._gauge("outrider_targets", "Targets that serve")
        self._drafters = self._gauge("outrider_draft_workers", "Draft workers that are connected")
        for model in models:
            self._announce(model)

    def watch(self, model: str) -> "Watch":
        """One request's, from its arrival on."""
        return Watch(self, model)

    def refused(self, model: str, status: int) -> None:
        """A request got an error."""
        self._refused.labels(model, ENGINE, str(status)).inc()

    def set_health(self, model: str, health: Health) -> None:
        """What the gauges show."""
        self._running.labels(model, ENGINE).set(health.running)
        self._waiting.labels(model, ENGINE).set(health.waiting)
        self._kv_usage.labels(model, ENGINE).set(health.kv_cache_usage)
        self._targets.labels(model, ENGINE).set(health.serving)
        self._drafters.labels(model, ENGINE).set(health.drafters)

    def exposition(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def _announce(self, model: str) -> None:
        """Shows what has not happened yet as zero: a rate over a counter that appears late is wrong."""
        for counter in (*self._counts.values(), self._prompt_tokens, self._output_tokens, self._queries):
            counter.labels(model, ENGINE)
        self._cancelled.labels(model, ENGINE)
        for reason in ("stop", "length"):
            self._finished.labels(model, ENGINE, reason)
        for histogram in (self._first_token, self._between, self._whole):
            histogram.labels(model, ENGINE)

    def _counter(self, name: str, words: str, *labels: str) -> "_Counted":
        names = (*LABELS, *labels)
        own = Counter(name, words, names, registry=self.registry)
        return _Counted(own, names, self._mirror and self._mirror(name, words, names, None))

    def _gauge(self, name: str, words: str) -> Gauge:
        return Gauge(name, words, LABELS, registry=self.registry)

    def _histogram(self, name: str, words: str, buckets: Sequence[float]) -> "_Counted":
        own = Histogram(name, words, LABELS, buckets=buckets, registry=self.registry)
        return _Counted(own, LABELS, self._mirror and self._mirror(name, words, LABELS, buckets))


class _Counted:
    """A counter or a histogram, and what it is repeated to."""

    def __init__(self, own: Counter | Histogram, names: tuple[str, ...], mirrored: Instrument | None) -> None:
        self._own, self._names, self._mirrored = own, names, mirrored
        self._series: dict[tuple[str, ...], _Series] = {}
        """Those that were asked for: finding one takes longer than counting, and every token is counted."""

    def labels(self, *values: str) -> "_Series":
        series = self._series.get(values)
        if series is None:
            labels = dict(zip(self._names, values, strict=True))
            series = self._series[values] = _Series(self._own.labels(*values), self._mirrored, labels)
        return series


class _Series:
    """One with its labels."""

    def __init__(self, own: Any, mirrored: Instrument | None, labels: dict[str, str]) -> None:
        self._own, self._mirrored, self._labels = own, mirrored, labels

    def inc(self, value: float = 1.0) -> None:
        self._own.inc(value)
        self._repeat(value)

    def observe(self, value: float) -> None:
        self._own.observe(value)
        self._repeat(value)

    def _repeat(self, value: float) -> None:
        if self._mirrored is not None and value:
            self._mirrored.add(value, self._labels)


class Watch:
    """Takes one request's times."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._labels = metrics, (model, ENGINE)
        self._arrived = time.monotonic()
        self._last: dict[int, float] = {}

    def tokens(self, choice: int, count: int) -> None:
        """So many came for a choice."""
        now = time.monotonic()
        last = self._last.get(choice)
        if last is None:
            self._metrics._first_token.labels(*self._labels).observe(now - self._arrived)
        else:
            between = self._metrics._between.labels(*self._labels)
            for _ in range(count):
                between.observe((now - last) / count)
        self._last[choice] = now
        self._metrics._output_tokens.labels(*self._labels).inc(count)

    def prompt(self, tokens: int, *, looked_up: int) -> None:
        """Prompts are being served; each choice looks its own up."""
        self._metrics._prompt_tokens.labels(*self._labels).inc(tokens)
        self._metrics._queries.labels(*self._labels).inc(looked_up)

    def completed(self, done: Completion, *, speculative: bool) -> None:
        """A choice is finished."""
        metrics, labels = self._metrics, self._labels
        metrics._finished.labels(*labels, str(done.finish_reason)).inc()
        metrics._whole.labels(*labels).observe(time.monotonic() - self._arrived)
        for name, counter in metrics._counts.items():
            counter.labels(*labels).inc(getattr(done.stats, name))
        for position, count in enumerate(done.stats.num_accepted_tokens_per_pos):
            metrics._per_position.labels(*labels, str(position)).inc(count)
        if not done.stats.num_drafts:
            reason = "did_not_pay" if speculative and done.stats.num_spec_steps else "off"
            metrics._unpaid.labels(*labels, reason).inc()

    def cancelled(self) -> None:
        """Its client went away."""
        self._metrics._cancelled.labels(*self._labels).inc()
