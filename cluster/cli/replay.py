"""``outrider replay``: other policies over a recorded run, without a model."""

import argparse
import json
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from outrider.cluster.cli.arguments import Commands
from outrider.cluster.nearest import nearest
from outrider.speculation.errors import InvalidConfigError

if TYPE_CHECKING:
    from outrider.cluster.seeing.recording import Recording
    from outrider.speculation.replay import ReplayCosts, ReplayPolicy

NAME = "replay"
SUMMARY = "try other draft trees on a recorded run, without a model"

DESCRIPTION = """\
Reads what 'outrider generate --record' wrote and counts the steps that other policies would
have taken for the same texts. With the recorded step times it says what they would have gained.

It knows what the target says of the nodes that the run verified, and of no others: policies can
leave nodes out, not add any. Record with large trees to compare small ones.
"""

EXAMPLES = """\
examples:
  outrider generate --prompt-file prompts.txt --record run.jsonl \\
      -sc '{"num_speculative_tokens": 32, "tree": {"adaptive": false}}'
  outrider replay run.jsonl
  outrider replay run.jsonl --policy num_speculative_tokens=6,depth=3 --policy chain --json

A policy is recorded, plain, or settings with commas between: num_speculative_tokens=N,
depth=N, chain. docs/seeing.md says how to read the figures.
"""

USUAL = ("recorded", "plain", "num_speculative_tokens=1", "num_speculative_tokens=2",
         "num_speculative_tokens=4", "num_speculative_tokens=8", "num_speculative_tokens=16",
         "num_speculative_tokens=2,chain", "num_speculative_tokens=4,chain", "chain",
         "depth=1", "depth=2", "depth=4")  # fmt: skip


def register(commands: Commands) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(NAME, help=SUMMARY, description=DESCRIPTION, epilog=EXAMPLES)
    parser.set_defaults(run=run)
    parser.add_argument("file", metavar="FILE", help="what --record wrote")
    parser.add_argument("--policy", metavar="P", action="append", help="a policy; repeat it for several")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints a row for each policy."""
    names = arguments.policy or USUAL
    policies = {name: parse_policy(name) for name in names}
    from outrider.cluster.cli.output import print_rows
    from outrider.cluster.seeing.recording import read_recording

    recording = read_recording(arguments.file)
    costs = learn_costs(recording)
    results = [_replayed(name, policy, recording, costs) for name, policy in policies.items()]
    title = f"{len(recording.requests)} recorded texts, drafting: {recording.drafting}"
    header = ["policy", "steps", "tokens per step", "accepted", "verified", "bare steps", "speed-up"]
    print_rows(title, header, [each.row() for each in results])
    print(
        "\nbare steps: nothing was recorded that the policy could verify. speed-up: over plain decoding,"
        "\nby the recorded step times. A policy that verifies less than was recorded drafts on after less,"
        "\nso its figures are rather too low."
    )
    if arguments.json:
        about = {
            "requests": len(recording.requests),
            "drafting": recording.drafting,
            "draft_step_seconds": costs.draft_seconds,
            "round_trip_seconds": costs.round_trip,
            "target_step_seconds": costs.target.tolist(),
        }
        print(json.dumps({**about, "policies": [each.as_dict() for each in results]}))
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a policy came to. seconds, plain_seconds: of its steps, and of plain decoding."""

    policy: str
    num_steps: int
    num_tokens: int
    num_accepted: int
    num_verified: int
    num_bare: int
    seconds: float
    plain_seconds: float

    def row(self) -> list[str]:
        """A row of the table."""
        counts = (self.num_accepted, self.num_verified, self.num_bare)
        per_step = f"{self.num_tokens / self.num_steps:.2f}"
        speed_up = f"{self.plain_seconds / self.seconds:.2f}"
        return [self.policy, str(self.num_steps), per_step, *map(str, counts), speed_up]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "policy": self.policy,
            "num_steps": self.num_steps,
            "num_output_tokens": self.num_tokens,
            "tokens_per_step": self.num_tokens / self.num_steps,
            "num_accepted_tokens": self.num_accepted,
            "num_draft_tokens": self.num_verified,
            "num_bare_steps": self.num_bare,
            "expected_tokens_per_second": self.num_tokens / self.seconds,
            "speed_up": self.plain_seconds / self.seconds,
        }


def parse_policy(text: str) -> "ReplayPolicy":
    """A policy as users write it.

    Raises:
        InvalidConfigError: a setting is unknown (the message names the nearest one) or not possible.
    """
    from outrider.speculation.replay import ReplayPolicy

    if text == "recorded":
        return ReplayPolicy()
    if text == "plain":
        return ReplayPolicy(num_speculative_tokens=0)
    settings: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if name not in ("num_speculative_tokens", "depth", "chain"):
            names = ("recorded", "plain", "num_speculative_tokens", "depth", "chain")
            raise InvalidConfigError(f"unknown policy {part!r}; did you mean {nearest(name, names)!r}?")
        if name == "chain" and not equals:
            settings[name] = True
        elif name != "chain" and value.isascii() and value.isdigit():
            settings[name] = int(value)
        else:
            how = "stands alone" if name == "chain" else "must be a non-negative integer"
            raise InvalidConfigError(f"--policy: {name} {how}, not {part!r}")
    return ReplayPolicy(**settings)


def learn_costs(recording: "Recording") -> "ReplayCosts":
    """What the recorded run's steps took."""
    from outrider.speculation.replay import ReplayCosts, fitted_curve

    steps = recording.steps
    draft_steps = sum(step.draft_steps for step in steps)
    draft_seconds = sum(step.draft_seconds for step in steps)
    waits = recording.drafting == "serial"
    return ReplayCosts(
        target=fitted_curve(steps, max(step.company * (1 + len(step.tree)) for step in steps)),
        draft_seconds=draft_seconds / draft_steps if draft_steps else 0.0,
        round_trip=median(recording.round_trips) if waits and recording.round_trips else 0.0,
        hides_drafting=recording.drafting in ("parallel", "pearl"),
    )


def _replayed(name: str, policy: "ReplayPolicy", recording: "Recording", costs: "ReplayCosts") -> Result:
    from outrider.speculation.replay import replay

    steps = [step for recorded in recording.requests.values() for step in replay(recorded, policy)]
    return Result(
        policy=name,
        num_steps=len(steps),
        num_tokens=sum(step.num_committed for step in steps),
        num_accepted=sum(step.num_accepted for step in steps),
        num_verified=sum(step.num_nodes for step in steps),
        num_bare=sum(not step.num_nodes for step in steps),
        seconds=sum(map(costs.seconds, steps)),
        plain_seconds=sum(map(costs.plain_seconds, steps)),
    )
