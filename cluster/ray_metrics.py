"""A server's counters among Ray's own metrics, which every node exports."""

from collections.abc import Mapping, Sequence

from ray.util.metrics import Counter, Histogram

from outrider.cluster.api.metrics import Instrument


def ray_instrument(
    name: str, words: str, labels: tuple[str, ...], bounds: Sequence[float] | None
) -> Instrument:
    """See ``Mirror``. Ray puts ``ray_`` before the name, in which it takes no colon."""
    plain = name.replace(":", "_")
    if bounds is None:
        return _Counter(Counter(plain, words, labels))
    return _Histogram(Histogram(plain, words, list(bounds), labels))


class _Counter:
    def __init__(self, counter: Counter) -> None:
        self._counter = counter

    def add(self, value: float, labels: Mapping[str, str]) -> None:
        self._counter.inc(value, dict(labels))


class _Histogram:
    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram

    def add(self, value: float, labels: Mapping[str, str]) -> None:
        self._histogram.observe(value, dict(labels))
