"""Other policies over recorded trees, worked out by hand, and ``outrider replay``."""

import json
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from instruments.remote import Deployment
from instruments.table_drafts import relative
from instruments.table_lm import TableLM

from outrider.cluster.cli.replay import learn_costs, parse_policy
from outrider.cluster.seeing.events import Drafted, EventLog, Judged, Stepped
from outrider.cluster.seeing.recording import Recorder, Recording, read_recording
from outrider.speculation.pipelines.shape import TreeShape
from outrider.speculation.replay import (
    RecordedStep,
    ReplayCosts,
    ReplayedStep,
    ReplayPolicy,
    fitted_curve,
    replay,
)
from outrider.speculation.request import Request, StepOutput
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.tree import DraftTree, Law
from outrider.speculation.types import Verdict

Run = Callable[..., tuple[int, str, str]]
LM = TableLM.random(3, vocab_size=5, order=2)


def recorded(
    tokens: Sequence[int],
    parents: Sequence[int],
    answers: Sequence[int],
    committed: int,
    *,
    position: int = 3,
) -> RecordedStep:
    tree = DraftTree(
        tokens=np.array(tokens, np.int64),
        parent_indices=np.array(parents, np.int64),
        scores=0.9 ** np.arange(1, len(tokens) + 1),
        law=Law.COUPLED,
    )
    return RecordedStep(
        position=position,
        num_committed=committed,
        tree=tree,
        target_tokens=np.array(answers, np.int64),
        company=1,
        rows=1 + len(tokens),
        seconds=0.01 + 0.001 * len(tokens),
        draft_steps=2,
        draft_seconds=0.004,
    )


BEST_IS_RIGHT = recorded([1, 2, 3, 9], [-1, 0, 1, -1], [1, 2, 3, 4, 0], 4)
"""The target takes 1 2 3, all drafted in one path, and then 4."""
SECOND_IS_RIGHT = recorded([9, 1, 8, 2], [-1, -1, 0, 1], [1, 0, 2, 0, 5], 3)
"""The best child is wrong; below the second best the target takes 1 2, and then 5."""

BRANCH_BETWEEN = recorded([1, 9, 2, 3], [-1, -1, 0, 2], [1, 2, 0, 3, 4], 4)
"""The best path is right, but the nodes of it do not stand one behind the other."""


def taken(step: RecordedStep, **policy: Any) -> list[tuple[int, int, int]]:
    """Nodes, accepted and committed tokens of each step."""
    steps = replay([step], ReplayPolicy(**policy))
    return [(each.num_nodes, each.num_accepted, each.num_committed) for each in steps]


@pytest.mark.parametrize(
    ("step", "policy", "expected"),
    [
        (BEST_IS_RIGHT, {}, [(4, 3, 4)]),
        (BEST_IS_RIGHT, {"num_speculative_tokens": 0}, [(0, 0, 1)] * 4),
        # One node: 1 is accepted and 2 follows; from there 3 is, and 4 follows.
        (BEST_IS_RIGHT, {"num_speculative_tokens": 1}, [(1, 1, 2), (1, 1, 2)]),
        # 1 and 2 are accepted and 3 follows; below it nothing was recorded.
        (BEST_IS_RIGHT, {"num_speculative_tokens": 2}, [(2, 2, 3), (0, 0, 1)]),
        (BEST_IS_RIGHT, {"depth": 1}, [(2, 1, 2), (1, 1, 2)]),
        (BEST_IS_RIGHT, {"chain": True}, [(3, 3, 4)]),
        (BEST_IS_RIGHT, {"chain": True, "num_speculative_tokens": 2}, [(2, 2, 3), (0, 0, 1)]),
        (BRANCH_BETWEEN, {"chain": True}, [(3, 3, 4)]),
        (SECOND_IS_RIGHT, {}, [(4, 2, 3)]),
        # The best path is 9 8: refused, the target takes 1, and 2 hangs below it.
        (SECOND_IS_RIGHT, {"chain": True}, [(2, 0, 1), (1, 1, 2)]),
        (SECOND_IS_RIGHT, {"num_speculative_tokens": 1}, [(1, 0, 1), (1, 1, 2)]),
        (SECOND_IS_RIGHT, {"num_speculative_tokens": 2}, [(2, 1, 2), (0, 0, 1)]),
        (SECOND_IS_RIGHT, {"depth": 1}, [(2, 1, 2), (0, 0, 1)]),
        (SECOND_IS_RIGHT, {"depth": 2, "num_speculative_tokens": 3}, [(3, 1, 2), (0, 0, 1)]),
    ],
)
def test_policies_choose_among_what_was_recorded(
    step: RecordedStep, policy: dict[str, Any], expected: list[tuple[int, int, int]]
) -> None:
    assert taken(step, **policy) == expected


def test_a_text_that_ended_early_ends_there_in_every_policy() -> None:
    cut = recorded([1, 2, 3, 9], [-1, 0, 1, -1], [1, 2, 3, 4, 0], 2)
    assert taken(cut) == [(4, 3, 2)]
    assert taken(cut, num_speculative_tokens=0) == [(0, 0, 1)] * 2


def test_steps_that_do_not_follow_one_another_are_refused() -> None:
    with pytest.raises(ValueError, match="position 9 follows one that ended at 7"):
        list(replay([BEST_IS_RIGHT, recorded([], [], [1], 1, position=9)], ReplayPolicy()))


@pytest.mark.parametrize(
    ("drafting", "round_trip", "hidden"),
    [("local", 0.0, False), ("serial", 0.03, False), ("parallel", 0.0, True), ("pearl", 0.0, True)],
)
def test_what_drafting_costs_depends_on_how_the_run_drafted(
    drafting: str, round_trip: float, hidden: bool
) -> None:
    steps = [recorded([1, 2], [-1, 0], [1, 2, 3], 3)]
    costs = learn_costs(Recording(drafting, {"r": steps}, [0.03]))
    assert (costs.draft_seconds, costs.round_trip, costs.hides_drafting) == (0.002, round_trip, hidden)


def test_costs_are_those_of_the_run() -> None:
    costs = ReplayCosts(
        target=np.array([10.0, 11, 12, 13, 14, 15]), draft_seconds=2.0, round_trip=1.0, hides_drafting=False
    )
    step = ReplayedStep(num_nodes=2, depth=2, num_accepted=1, num_committed=2, company=1)
    assert costs.seconds(step) == 12 + 1 + 2 * 2
    assert costs.plain_seconds(step) == 2 * 10
    pair = ReplayedStep(num_nodes=2, depth=2, num_accepted=1, num_committed=2, company=2)
    assert costs.seconds(pair) == 15 / 2 + 1 + 2 * 2
    assert costs.plain_seconds(pair) == 2 * 11 / 2
    bare = ReplayedStep(num_nodes=0, depth=0, num_accepted=0, num_committed=1, company=1)
    assert costs.seconds(bare) == costs.plain_seconds(bare) == 10


def test_the_curve_goes_through_the_recorded_steps() -> None:
    curve = fitted_curve([BEST_IS_RIGHT, recorded([], [], [1], 1)], 5)
    assert curve[[0, 4]] == pytest.approx([0.01, 0.014])


@pytest.fixture
def recording(tmp_path: Path) -> tuple[Path, Any]:
    """A run of three requests with a drafter elsewhere, and what its engine counted."""
    text = StringIO()
    recorder = Recorder(text, drafting="serial")
    log: list[EventLog] = []

    def make(clock: Any) -> EventLog:
        log.append(EventLog(recorder.feed, clock))
        return log[0]

    shape = TreeShape(num_speculative_tokens=12, depth=3, adaptive=False)
    draft = relative(LM, 0.6, seed=1)
    target = Deployment(LM, draft=draft, shape=shape, pipeline="serial", trace=make).target
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=30)
    running = [target.start([1, 2, start], params) for start in range(3)]
    target.finish(running)
    log[0].flush()
    file = tmp_path / "run.jsonl"
    file.write_text(text.getvalue(), encoding="utf-8")
    return file, running


def test_the_recorded_policy_reproduces_the_engine_s_own_counts(recording: tuple[Path, Any]) -> None:
    file, running = recording
    read = read_recording(str(file))
    for finished in running:
        stats, steps = finished.stats, read.requests[finished.run.request.request_id]
        replayed = list(replay(steps, ReplayPolicy()))
        assert len(replayed) == stats.target_steps
        assert sum(each.num_nodes for each in replayed) == stats.num_draft_tokens
        assert sum(each.num_accepted for each in replayed) == stats.num_accepted_tokens > 0
        assert sum(each.num_committed for each in replayed) == stats.num_output_tokens
        assert [each.num_committed for each in replayed] == [len(each.token_ids) for each in finished.steps]
        plain = list(replay(steps, ReplayPolicy(num_speculative_tokens=0)))
        assert len(plain) == stats.num_output_tokens


def test_a_line_has_the_timings_of_its_step(recording: tuple[Path, Any]) -> None:
    file, running = recording
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    for finished in running:
        own = [line for line in lines if line["request"] == finished.run.request.request_id]
        stats = finished.stats
        assert sum(line["wait_seconds"] for line in own) == pytest.approx(stats.wait_seconds)
        # The round after its last step is in no line.
        assert 0 <= stats.draft_steps - sum(line["draft_steps"] for line in own) <= 3
        assert 0 <= stats.draft_seconds - sum(line["draft_seconds"] for line in own) < 0.03
        # A millisecond there and one back, and what a worker's other sessions hold it up.
        trips = [line["round_trip"] for line in own[1:] if line["round_trip"] is not None]
        assert len(trips) > 3
        assert min(trips) >= 0.002 - 1e-9
    for line in lines:
        assert line["seconds"] == pytest.approx(0.05 + 0.0005 * (line["rows"] - 1))


def test_requests_share_a_draft_step_of_this_process_by_rows() -> None:
    requests = [Request(prompt_ids=np.array([1]), params=SamplingParams(seed=0)) for _ in range(2)]
    text = StringIO()
    recorder = Recorder(text, drafting="local")
    recorder.feed([Drafted((1.0, 1.4), requests, [1, 3]), Drafted((1.5, 1.6), requests[:1], [2])])
    parts = [
        Judged(
            request=request,
            position=1,
            rows=1,
            tree=DraftTree.empty(),
            tokens=np.array([7]),
            verdict=Verdict(accepted=np.zeros(0, np.int64), token=7),
            output=StepOutput(token_ids=[7], num_accepted=0, text=""),
        )
        for request in requests
    ]
    recorder.feed([Stepped((1.0, 3.0), (2.0, 2.5), parts)])
    _, *lines = [json.loads(line) for line in text.getvalue().splitlines()]
    assert [line["draft_steps"] for line in lines] == [2, 1]
    assert [line["draft_seconds"] for line in lines] == pytest.approx([0.2, 0.3])
    assert [(line["rows"], line["company"], line["seconds"]) for line in lines] == [(2, 2, 0.5)] * 2


def test_the_table_and_the_last_line(recording: tuple[Path, Any], outrider_: Run) -> None:
    file, running = recording
    code, out, err = outrider_("replay", str(file), "--json")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "3 recorded texts, drafting: serial"
    result = json.loads(lines[-1])
    by_name = {each["policy"]: each for each in result["policies"]}
    assert by_name["plain"]["speed_up"] == pytest.approx(1)
    assert by_name["plain"]["num_steps"] == 90
    assert by_name["recorded"]["num_steps"] == sum(each.stats.target_steps for each in running)
    assert by_name["recorded"]["tokens_per_step"] > by_name["num_speculative_tokens=1"]["tokens_per_step"] > 1
    assert result["draft_step_seconds"] > 0.003
    assert result["round_trip_seconds"] > 0.0019


def test_policies_of_one_s_own(recording: tuple[Path, Any], outrider_: Run) -> None:
    policy = "num_speculative_tokens=3,depth=2,chain"
    code, out, _ = outrider_("replay", str(recording[0]), "--policy", policy, "--json")
    assert code == 0
    (only,) = json.loads(out.splitlines()[-1])["policies"]
    assert only["policy"] == policy
    assert parse_policy(policy) == ReplayPolicy(num_speculative_tokens=3, depth=2, chain=True)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("num_speculative_token=3", "unknown policy 'num_speculative_token=3'; did you mean"),
        ("", "unknown policy ''; did you mean"),
        ("depth=-1", "--policy: depth must be a non-negative integer, not 'depth=-1'"),
        ("chain=2", "--policy: chain stands alone, not 'chain=2'"),
        ("depth", "--policy: depth must be a non-negative integer, not 'depth'"),
    ],
)
def test_unknown_policies_are_refused(policy: str, message: str, outrider_: Run) -> None:
    code, out, err = outrider_("replay", "x.jsonl", "--policy", policy)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


HEAD = '{"outrider_recording": 1, "drafting": "local"}\n'
LINE = {
    "request": "r", "position": 1, "tokens": [1], "parents": [-1], "scores": [0.5], "target_tokens": [1, 2],
    "committed": [1, 2], "company": 1, "rows": 2, "seconds": 0.1, "draft_steps": 1, "draft_seconds": 0.1,
    "round_trip": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"\xff", "cannot be read: 'utf-8' codec"),
        (b"", "is not a recording that 'outrider generate --record' wrote"),
        (b'{"a": 1}\n', "is not a recording"),
        (HEAD.encode(), "has no steps"),
        ((HEAD + "{").encode(), "line 2 of the recording"),
        ((HEAD + json.dumps({**LINE, "parents": [0]})).encode(), "parent 0 of node 0 is not an earlier node"),
        ((HEAD + json.dumps({**LINE, "target_tokens": [1]})).encode(), "1 target tokens for 1 nodes"),
        ((HEAD + json.dumps({"request": "r"})).encode(), "is damaged (KeyError: 'position')"),
    ],
)
def test_what_is_no_recording_is_refused_in_one_line(
    content: bytes | None, message: str, outrider_: Run, tmp_path: Path
) -> None:
    file = tmp_path / "run.jsonl"
    if content is not None:
        file.write_bytes(content)
    code, out, err = outrider_("replay", str(file))
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
