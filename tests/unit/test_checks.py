"""``outrider check`` on a cluster of several nodes, which are made up."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from outrider.cluster import checks
from outrider.cluster.checks import check
from outrider.cluster.cluster_config import parse_config
from outrider.cluster.placement import Node
from outrider.cluster.probe import ModelReport

Ask = Callable[[Sequence[str]], list[ModelReport]]
CONFIG = parse_config(
    {
        "address": "auto",
        "target": {"model": "/models/target", "labels": {"tier": "big"}},
        "draft": {"model": "/models/draft"},
    },
    "x",
)


def node(name: str, tier: str, problems: dict[str, str], vocab: str | None = "all") -> tuple[Node, Ask]:
    """A node that sees every model but those with problems; vocab: of all models, or each its own."""

    def ask(models: Sequence[str]) -> list[ModelReport]:
        return [
            ModelReport(model=each, problem=problems.get(each, ""), vocab_hash=vocab or each)
            for each in models
        ]

    return Node(name=name, resources={"CPU": 4.0}, labels={"tier": tier}), ask


def problems_of(nodes: list[tuple[Node, Ask]], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    @contextmanager
    def made_up(_: object) -> Iterator[list[tuple[Node, Ask]]]:
        yield nodes

    monkeypatch.setattr(checks, "_nodes", made_up)
    return check(CONFIG).problems


def test_a_model_that_one_of_the_nodes_lacks_is_named_with_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "there is no folder /models/draft"
    nodes = [node("one", "big", {}), node("two", "small", {"/models/draft": line})]
    assert problems_of(nodes, monkeypatch) == [f"on two: {line}"]


def test_nodes_that_do_not_run_a_model_need_not_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node("one", "big", {}), node("two", "small", {"/models/target": "there is no such folder"})]
    assert problems_of(nodes, monkeypatch) == []


def test_vocabularies_that_differ_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = problems_of([node("one", "big", {}, vocab=None)], monkeypatch)
    assert problem == "draft pool 'draft': /models/draft has another vocabulary than /models/target"
