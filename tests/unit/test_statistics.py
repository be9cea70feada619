"""Derived figures against their definitions."""

import dataclasses

import pytest

from outrider.speculation.statistics import SpeculationStatistics


def recorded(*outcomes: tuple[int, int, str]) -> SpeculationStatistics:
    statistics = SpeculationStatistics()
    for drafted, accepted, drafter in outcomes:
        statistics.record_verification(
            num_draft_tokens=drafted, num_accepted_tokens=accepted, proposers={drafter: accepted}
        )
    return statistics


def test_figures_follow_their_definitions() -> None:
    statistics = recorded((4, 2, "a"), (4, 0, "a"), (0, 0, "a"), (2, 2, "b"), (4, 3, "a"))
    assert statistics.num_spec_steps == 5
    assert statistics.num_drafts == 4, "an empty tree is no draft"
    assert statistics.mean_acceptance_length == 1 + 7 / 4
    assert statistics.draft_acceptance_rate == 7 / 14
    assert statistics.num_accepted_tokens_per_pos == [3, 3, 1]
    assert statistics.acceptance_rate_per_pos == [0.75, 0.75, 0.25]
    assert statistics.acceptance_histogram == [1, 0, 2, 1]
    assert statistics.accepted_by_drafter == {"a": 5, "b": 2}


def test_the_reply_has_vllms_shape() -> None:
    """The example of vLLM's own description of the field (pull request 48915)."""
    statistics = recorded(*[(3, 0, "d")] * 39, (3, 1, "d"), *[(3, 3, "d")] * 3)
    reply = statistics.as_dict()
    assert list(reply)[:6] == [
        "mean_acceptance_length",
        "draft_acceptance_rate",
        "acceptance_histogram",
        "num_spec_steps",
        "num_accepted_draft_tokens",
        "num_draft_tokens",
    ]
    assert list(reply.values())[:6] == [
        pytest.approx(1.2325581395348837),
        pytest.approx(0.07751937984496124),
        [39, 1, 0, 3],
        43,
        10,
        129,
    ]


def test_the_reply_states_every_raw_count_and_does_not_alias_them() -> None:
    statistics = SpeculationStatistics(reroot_hits=3, target_seconds=1.5, accepted_by_drafter={"a": 1})
    reply = statistics.as_dict()
    renamed = {"num_accepted_tokens", "num_accepted_tokens_per_pos"}
    assert {each.name for each in dataclasses.fields(statistics)} - renamed <= set(reply)
    assert (reply["reroot_hits"], reply["target_seconds"]) == (3, 1.5)
    statistics.accepted_by_drafter["a"] = 9
    assert reply["accepted_by_drafter"] == {"a": 1}


def test_without_drafts_nothing_is_divided_by_zero() -> None:
    statistics = recorded((0, 0, "a"))
    assert statistics.mean_acceptance_length == 1.0
    assert statistics.draft_acceptance_rate == 0.0
    assert statistics.acceptance_rate_per_pos == []
    assert statistics.acceptance_histogram == [0]
    assert statistics.accepted_by_drafter == {}


def test_merging_equals_recording_together() -> None:
    one, two = [(4, 2, "a"), (3, 0, "b")], [(5, 5, "b"), (0, 0, "a"), (1, 1, "c")]
    merged, other = recorded(*one), recorded(*two)
    merged.merge(other)
    assert merged == recorded(*one, *two)
    assert other == recorded(*two), "the other one stays as it is"


def test_merging_adds_every_field() -> None:
    numbers = {
        each.name: index + 1
        for index, each in enumerate(dataclasses.fields(SpeculationStatistics))
        if each.type in (int, float)
    }
    assert len(numbers) == 30
    total = SpeculationStatistics(**numbers)
    total.merge(SpeculationStatistics(**numbers))
    assert total == SpeculationStatistics(**{name: 2 * value for name, value in numbers.items()})


@pytest.mark.parametrize(("drafted", "accepted"), [(1, 2), (1, -1), (-1, -1)])
def test_impossible_verifications_are_refused(drafted: int, accepted: int) -> None:
    statistics = SpeculationStatistics()
    with pytest.raises(ValueError, match=f"{accepted} of {drafted}"):
        statistics.record_verification(num_draft_tokens=drafted, num_accepted_tokens=accepted)
    assert statistics == SpeculationStatistics()
