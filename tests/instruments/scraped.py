"""What a live server has counted, as its ``/metrics`` tells anybody."""

from typing import TypeAlias

import httpx
from prometheus_client.parser import text_string_to_metric_families

Counts: TypeAlias = dict[str, float]
"""By name, and where a counter has positions, by ``name[position]``."""


def counts(url: str, key: str) -> Counts:
    """All counters of a server with one model; what differs by reason or status is added up."""
    reply = httpx.get(f"{url}/metrics", headers={"authorization": f"Bearer {key}"}, timeout=60)
    reply.raise_for_status()
    found: Counts = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples if family.type == "counter" else ():
            position = sample.labels.get("position")
            name = sample.name if position is None else f"{sample.name}[{position}]"
            found[name] = found.get(name, 0.0) + sample.value
    return found


def between(before: Counts, after: Counts) -> Counts:
    """What was counted from one look to the next."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}
