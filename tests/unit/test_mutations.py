"""Every check can fail: the engine is broken on purpose, and the check of the named test must notice.

docs/mutations.md is the list for readers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forwards import make_runner
from instruments import faults
from instruments.checks import (
    GREEDY,
    SEEDED,
    check_answers,
    check_closing,
    check_eos,
    check_forward_counts,
    check_identity,
    check_law,
    check_stop_strings,
)
from instruments.kv_checks import check_forking, check_publishing
from instruments.model_checks import (
    AuditedRunner,
    check_draft_session,
    check_idle_after_closing,
    check_kv_after_commits,
    check_model_identity,
    check_rows_are_paths,
    decoder,
)
from instruments.ragged_checks import MAX_SEQUENCES, check_ragged_forwards
from instruments.replication import check_aliases, check_crossing, check_gaps, check_generations
from instruments.sampled_law import SHAPES, check_sampled_law

from outrider.actors import request_run
from outrider.actors.request_run import RequestRun
from outrider.models.kv_cache import KVSequence
from outrider.speculation import sampling
from outrider.speculation.replication.replica import Replica
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.tree import DraftTree
from outrider.speculation.verifiers import coupled

Mutate = Callable[[pytest.MonkeyPatch], None]
Check = Callable[[Path], object]

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = REPOSITORY / "docs" / "mutations.md"
LAWS, SCENARIOS = "tests/golden/test_laws.py", "tests/golden/test_scenarios.py"
CACHE = "tests/unit/test_kv_cache.py"
MODELS = "tests/golden/test_model_scenarios.py"
REPLICA = "tests/property/test_replica.py"


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """A fault, and the check that must notice it: the one that ``caught_by`` runs."""

    name: str
    mutate: Mutate
    check: Check
    caught_by: str


def setting(where: Any, name: str, value: Any) -> Mutate:
    return lambda patch: patch.setattr(where, name, value)


def audited(check: Callable[[AuditedRunner], object]) -> Check:
    return lambda folder: check(AuditedRunner(decoder(folder, torch.float32)))


def check_drafting(folder: Path) -> None:
    runner = AuditedRunner(decoder(folder, torch.float32))
    check_draft_session(runner, SamplingParams(seed=5, max_tokens=99), 30)


def check_several_sequences(folder: Path) -> None:
    check_ragged_forwards(make_runner(folder, num_sequences=MAX_SEQUENCES + 1))


def on_table(check: Callable[..., object], *arguments: Any) -> Check:
    return lambda _: check(*arguments)


MUTATIONS = [
    Mutation(
        name="a reused draw, by enumeration",
        mutate=setting(request_run, "row_positions", faults.reused_draw),
        check=on_table(check_law, "coupled chain", 2),
        caught_by=f"{LAWS}::test_enumerated_law_equals_the_target_s",
    ),
    *(
        Mutation(
            name=f"a reused draw, sampled, {shape}",
            mutate=setting(sampling, "row_positions", faults.reused_draw),
            check=on_table(check_sampled_law, shape),
            caught_by=f"{LAWS}::test_sampled_law_within_chance",
        )
        for shape in SHAPES
    ),
    Mutation(
        name="noise off by one position",
        mutate=setting(request_run, "row_positions", faults.off_by_one),
        check=on_table(check_identity, SEEDED, 2),
        caught_by=f"{LAWS}::test_seeded_output_is_the_definition_s_for_every_length_and_drafter",
    ),
    Mutation(
        name="swapped sibling KV",
        mutate=faults.swap_siblings,
        check=audited(check_rows_are_paths),
        caught_by=f"{MODELS}::test_a_node_s_logits_are_those_of_its_path_alone",
    ),
    Mutation(
        name="EOS unchecked",
        mutate=setting(request_run, "StopChecker", faults.NoEos),
        check=on_table(check_eos),
        caught_by=f"{SCENARIOS}::test_output_ends_at_the_first_committed_eos",
    ),
    Mutation(
        name="EOS unchecked inside the accepted path",
        mutate=setting(request_run, "StopChecker", faults.LastTokenOnly),
        check=on_table(check_eos),
        caught_by=f"{SCENARIOS}::test_output_ends_at_the_first_committed_eos",
    ),
    Mutation(
        name="a missing penalty along the path",
        mutate=setting(sampling._Penalties, "_count", faults.count_history_only),
        check=on_table(check_answers, "greedy with penalties"),
        caught_by=f"{SCENARIOS}::test_sampling_parameters_mean_the_same_with_any_drafter",
    ),
    Mutation(
        name="min_tokens not counted along the path",
        mutate=setting(sampling, "row_positions", faults.pathless_positions),
        check=on_table(check_answers, "stop ids"),
        caught_by=f"{SCENARIOS}::test_sampling_parameters_mean_the_same_with_any_drafter",
    ),
    Mutation(
        name="keys padded to the batch's maximum",
        mutate=faults.groups_padded_to_batch,
        check=audited(check_rows_are_paths),
        caught_by=f"{MODELS}::test_a_node_s_logits_are_those_of_its_path_alone",
    ),
    Mutation(
        name="a sequence's attention given to another's rows",
        mutate=faults.unshifted_groups,
        check=check_several_sequences,
        caught_by="tests/golden/test_ragged_forward.py::test_rows_are_the_same_as_alone",
    ),
    Mutation(
        name="a text found through another's table",
        mutate=faults.everyones_table,
        check=check_several_sequences,
        caught_by="tests/golden/test_ragged_forward.py::test_rows_are_the_same_as_alone",
    ),
    Mutation(
        name="a neighbour's node attended",
        mutate=faults.neighbours_path,
        check=audited(check_rows_are_paths),
        caught_by=f"{MODELS}::test_a_node_s_logits_are_those_of_its_path_alone",
    ),
    Mutation(
        name="the root left out below it",
        mutate=faults.text_seen_short,
        check=audited(check_rows_are_paths),
        caught_by=f"{MODELS}::test_a_node_s_logits_are_those_of_its_path_alone",
    ),
    Mutation(
        name="accepted KV taken from the wrong slot",
        mutate=faults.commit_by_depth,
        check=audited(check_kv_after_commits),
        caught_by=f"{MODELS}::test_kv_after_every_commit_is_a_fresh_prefill_s",
    ),
    Mutation(
        name="accepted KV moved to the wrong slot",
        mutate=faults.commit_one_too_far,
        check=audited(check_kv_after_commits),
        caught_by=f"{MODELS}::test_kv_after_every_commit_is_a_fresh_prefill_s",
    ),
    Mutation(
        name="accepted KV moved to the wrong slot, under an engine",
        mutate=faults.commit_backwards,
        check=lambda folder: check_model_identity(
            folder, torch.float32, SamplingParams(temperature=0.0, max_tokens=13), 28
        ),
        caught_by=f"{MODELS}::test_answers_and_kv_with_every_drafter",
    ),
    Mutation(
        name="a draft session's KV moved to the wrong slot",
        mutate=faults.commit_by_depth,
        check=check_drafting,
        caught_by=f"{MODELS}::test_a_draft_session_is_what_a_fresh_one_would_be",
    ),
    Mutation(
        name="unverified tokens accepted",
        mutate=setting(coupled, "match", faults.accept_everything),
        check=on_table(check_identity, GREEDY, 2),
        caught_by=f"{SCENARIOS}::test_greedy_output_has_the_exact_length_and_tokens",
    ),
    Mutation(
        name="right tokens accepted below wrong parents",
        mutate=setting(coupled, "match", faults.accept_orphans),
        check=on_table(check_identity, GREEDY, 2),
        caught_by=f"{SCENARIOS}::test_greedy_output_has_the_exact_length_and_tokens",
    ),
    Mutation(
        name="the last window not cut at max_tokens",
        mutate=setting(request_run, "StopChecker", faults.WholeWindows),
        check=on_table(check_identity, GREEDY, 2),
        caught_by=f"{SCENARIOS}::test_greedy_output_has_the_exact_length_and_tokens",
    ),
    Mutation(
        name="stop strings not found across tokens",
        mutate=setting(request_run, "StopChecker", faults.NoStraddling),
        check=on_table(check_stop_strings),
        caught_by=f"{SCENARIOS}::test_stop_strings_may_straddle_the_bonus_token",
    ),
    Mutation(
        name="speculation silently off",
        mutate=setting(RequestRun, "select", lambda *_: DraftTree.empty()),
        check=on_table(check_forward_counts, 2),
        caught_by=f"{SCENARIOS}::test_forward_counts_of_perfect_and_wrong_drafters",
    ),
    Mutation(
        name="a closed request keeps its KV",
        mutate=setting(RequestRun, "close", lambda run: setattr(run, "finished", True)),
        check=on_table(check_closing),
        caught_by=f"{SCENARIOS}::test_closing_half_way_frees_everything",
    ),
    Mutation(
        name="KV blocks leaked",
        mutate=setting(KVSequence, "close", lambda _: None),
        check=audited(check_idle_after_closing),
        caught_by=f"{MODELS}::test_nothing_leaks_from_requests_closed_half_way",
    ),
    Mutation(
        name="KV published before it is committed",
        mutate=faults.publish_early,
        check=on_table(check_publishing),
        caught_by=f"{CACHE}::test_speculative_entries_are_not_published",
    ),
    Mutation(
        name="a block shared that both write into",
        mutate=setting(KVSequence, "fork", faults.share_all_blocks),
        check=on_table(check_forking),
        caught_by=f"{CACHE}::test_a_fork_shares_full_blocks_and_copies_the_rest",
    ),
    Mutation(
        name="a stale generation accepted",
        mutate=faults.accept_any_generation,
        check=on_table(check_generations),
        caught_by=f"{REPLICA}::test_growth_of_an_earlier_generation_is_not_placed",
    ),
    Mutation(
        name="growth that crossed a commit not walked",
        mutate=faults.on_arrays(setting(Replica, "_walk", faults.drop_what_crossed)),
        check=on_table(check_crossing),
        caught_by=f"{REPLICA}::test_growth_that_crossed_a_commit_is_walked_down_the_committed_tokens",
    ),
    Mutation(
        name="a committed node's alias off by one position",
        mutate=faults.on_arrays(faults.shift_aliases),
        check=on_table(check_aliases),
        caught_by=f"{REPLICA}::test_a_committed_node_stays_the_parent_of_later_growth",
    ),
    Mutation(
        name="an unacknowledged gap ignored",
        mutate=faults.on_arrays(faults.skip_gaps),
        check=on_table(check_gaps),
        caught_by=f"{REPLICA}::test_old_messages_are_ignored_and_gaps_are_not",
    ),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_named_check_fails(
    mutation: Mutation, make_model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model_folder("llama")
    mutation.check(folder)
    mutation.mutate(monkeypatch)
    # Where the program itself stumbles over the fault, the named test fails as well.
    with pytest.raises((AssertionError, ValueError)):
        mutation.check(folder)


def test_the_document_lists_the_same() -> None:
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in DOCUMENT.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith("| mutation")
    ]
    assert [(row[0], row[-1].strip("`")) for row in cells] == [
        (each.name, each.caught_by) for each in MUTATIONS
    ]


@pytest.mark.parametrize("name", sorted({each.caught_by for each in MUTATIONS}))
def test_the_named_tests_exist(name: str) -> None:
    file, test = name.split("::")
    assert f"\ndef {test}(" in (REPOSITORY / file).read_text(encoding="utf-8")
