"""What would run where, in plain arithmetic."""

from outrider.cluster.cluster_config import Resources, parse_config
from outrider.cluster.placement import Need, Node, needs_of, plan


def need(name: str, ranks: int = 1, **resources: object) -> Need:
    return Need(name=name, ranks=ranks, each=Resources.model_validate(resources))


def test_groups_come_before_draft_workers_and_are_named() -> None:
    config = parse_config({"target": {"replicas": 2}, "draft": {"name": "small", "replicas": 2}}, "x")
    assert [each.name for each in needs_of(config)] == ["target-0", "target-1", "small-0", "small-1"]


def test_ngrams_take_no_process() -> None:
    assert [each.name for each in needs_of(parse_config({"draft": {"method": "ngram"}}, "x"))] == ["target-0"]


def test_processes_go_where_most_room_is_left() -> None:
    nodes = [Node(name="a", resources={"CPU": 4.0}), Node(name="b", resources={"CPU": 3.0})]
    planned = plan([need("x"), need("y"), need("z")], nodes)
    assert planned.places == {"x": "a", "y": "b", "z": "a"}
    assert planned.problems == []


def test_a_group_stays_on_one_node() -> None:
    nodes = [Node(name=name, resources={"GPU": 2.0, "CPU": 8.0}) for name in "ab"]
    planned = plan([need("target-0", ranks=4, num_gpus=1)], nodes)
    assert planned.places == {}
    (problem,) = planned.problems
    assert problem == (
        "target-0 needs 4 CPU, 4 GPU on one node; left are: a has 8 CPU, 2 GPU; b has 8 CPU, 2 GPU"
    )


def test_room_that_is_taken_is_not_offered_twice() -> None:
    planned = plan([need("x", num_cpus=2), need("y", num_cpus=2)], [Node(name="a", resources={"CPU": 3.0})])
    assert planned.places == {"x": "a"}
    assert planned.problems == ["y needs 2 CPU on one node; left are: a has 1 CPU"]


def test_labels_and_accelerators_decide() -> None:
    nodes = [
        Node(name="a", resources={"CPU": 8.0}, labels={"tier": "draft"}),
        Node(name="b", resources={"CPU": 2.0, "accelerator_type:H200": 1.0}, labels={"tier": "target"}),
    ]
    planned = plan([need("x", labels={"tier": "target"}), need("y", accelerator_type="H200")], nodes)
    assert planned.places == {"x": "b", "y": "b"}
    (problem,) = plan([need("x", labels={"tier": "none"})], nodes).problems
    assert problem == "x wants a node with tier=none, and none of 2 has these labels"


def test_gpus_may_be_shared() -> None:
    workers = [need(f"d-{index}", num_gpus=0.25) for index in range(5)]
    planned = plan(workers, [Node(name="a", resources={"CPU": 8.0, "GPU": 1.0})])
    assert len(planned.places) == 4
    assert len(planned.problems) == 1
