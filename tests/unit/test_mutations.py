"""Every check can fail: the engine is broken on purpose, and the check of the named test must notice.

docs/mutations.md is the list for readers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forwards import make_runner
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
from instruments.sampled_law import SHAPES, check_sampled_law

from outrider.actors import model_runner, request_run
from outrider.actors.draft_engine import TREE_CAPACITY
from outrider.actors.request_run import RequestRun
from outrider.kernels.tree_attention import AttentionGroup
from outrider.models import batch
from outrider.models.batch import Rows
from outrider.models.kv_cache import KVSequence
from outrider.models.numerics import RowClasses
from outrider.speculation import sampling
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.stopping import StopChecker, StopOutcome
from outrider.speculation.tree import DraftTree
from outrider.speculation.types import FinishReason, FloatArray, IntArray, Verdict
from outrider.speculation.verifiers import coupled

Mutate = Callable[[pytest.MonkeyPatch], None]
Check = Callable[[Path], object]

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = REPOSITORY / "docs" / "mutations.md"
LAWS, SCENARIOS = "tests/golden/test_laws.py", "tests/golden/test_scenarios.py"
MODELS = "tests/golden/test_model_scenarios.py"


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """A fault, and the check that must notice it: the one that ``caught_by`` runs."""

    name: str
    mutate: Mutate
    check: Check
    caught_by: str


def reused_draw(length: int, tree: DraftTree) -> IntArray:
    return length + np.concatenate(([0], np.maximum(tree.depths - 1, 0)))


def off_by_one(length: int, tree: DraftTree) -> IntArray:
    """Only where something was drafted; shifting every step alike would merely be other noise."""
    return length + np.concatenate(([0], tree.depths)) + int(len(tree) > 0)


def pathless_positions(length: int, tree: DraftTree) -> IntArray:
    return np.full(len(tree) + 1, length)


def swap_siblings(patch: pytest.MonkeyPatch) -> None:
    """The first two children of the root are attended in each other's place."""
    original = model_runner.tree_rows

    def swapped(*arguments: Any) -> Rows:
        rows = original(*arguments)
        if len(rows.node_slots) < 2:
            return rows
        slots = rows.node_slots.copy()
        slots[[0, 1]] = slots[[1, 0]]
        return replace(rows, node_slots=slots)

    patch.setattr(model_runner, "tree_rows", swapped)


class NoEos(StopChecker):
    def __init__(self, params: SamplingParams, eos_ids: Sequence[int], *others: Any) -> None:  # noqa: ARG002
        super().__init__(params, (), *others)


class LastTokenOnly(StopChecker):
    """Looks for the end in the target's own token only."""

    def _end_by_token(self, tokens: Sequence[int]) -> StopOutcome:
        outcome = super()._end_by_token(tokens)
        early = outcome.finish_reason is FinishReason.STOP and outcome.num_kept < len(tokens)
        return StopOutcome(num_kept=len(tokens)) if early else outcome


class WholeWindows(StopChecker):
    """Does not cut the last window at ``max_tokens``."""

    def _end_by_token(self, tokens: Sequence[int]) -> StopOutcome:
        outcome = super()._end_by_token(tokens)
        too_long = outcome.finish_reason is FinishReason.LENGTH
        return replace(outcome, num_kept=len(tokens)) if too_long else outcome


class NoStraddling(StopChecker):
    """Looks for stop strings within a token's own text."""

    def _find_stop(self, old_length: int) -> tuple[int, str] | None:
        found = super()._find_stop(old_length)
        return None if found is not None and found[0] < old_length else found


def count_history_only(self: Any, tree: DraftTree) -> tuple[IntArray, FloatArray]:
    ids = self._ids[: self._num_ids]
    return ids, np.tile(self._counts[ids], (len(tree) + 1, 1))


def pad_to_batch(rows: Rows, classes: RowClasses, dtype: torch.dtype) -> list[AttentionGroup]:
    """Every row takes its shared keys, and so its order of summing, from the longest row."""
    stride = batch.STRIDE
    prefix = stride * np.maximum(0, rows.positions // stride - 1)
    longest = np.full_like(prefix, prefix.max())
    slots, mask = batch._canonical_tails(rows, longest)
    return [
        AttentionGroup(
            rows=None,
            num_rows=len(prefix),
            padded=classes.attention_rows(len(prefix)),
            shared=(rows.base, int(prefix.max())),
            tail_slots=torch.from_numpy(slots.reshape(-1)),
            tail_mask=torch.from_numpy(mask[:, None]).to(dtype),
        )
    ]


def unshifted_groups(patch: pytest.MonkeyPatch) -> None:
    """Every part's attention is that of the forward's first rows."""
    original = batch._shifted
    patch.setattr(batch, "_shifted", lambda group, _: original(group, 0))


def commit_by_depth(patch: pytest.MonkeyPatch) -> None:
    """Takes the first nodes of the arena for the accepted ones."""
    original = KVSequence.commit_nodes
    patch.setattr(KVSequence, "commit_nodes", lambda self, nodes: original(self, np.arange(len(nodes))))


def commit_one_too_far(patch: pytest.MonkeyPatch) -> None:
    """Moves the accepted entries one position too far."""
    original = KVSequence.commit_nodes

    def moved(self: KVSequence, nodes: IntArray) -> None:
        self.length += 1
        original(self, nodes)
        self.length -= 1

    patch.setattr(KVSequence, "commit_nodes", moved)


def commit_backwards(patch: pytest.MonkeyPatch) -> None:
    original = KVSequence.commit_nodes
    patch.setattr(KVSequence, "commit_nodes", lambda self, nodes: original(self, nodes[::-1].copy()))


def accept_everything(tree: DraftTree, target_tokens: IntArray) -> Verdict:
    """The deepest path, whatever the target says."""
    if not len(tree):
        return Verdict(accepted=np.zeros(0, np.int64), token=int(target_tokens[0]))
    last = int(tree.depths.argmax())
    return Verdict(accepted=tree.ancestor_mask[last].nonzero()[0], token=int(target_tokens[last + 1]))


def accept_orphans(tree: DraftTree, target_tokens: IntArray) -> Verdict:
    """A node that agrees is accepted although its parent was not."""
    agrees = tree.tokens == target_tokens[tree.parent_indices + 1]
    if not agrees.any():
        return Verdict(accepted=np.zeros(0, np.int64), token=int(target_tokens[0]))
    last = int(np.where(agrees, tree.depths, 0).argmax())
    return Verdict(accepted=tree.ancestor_mask[last].nonzero()[0], token=int(target_tokens[last + 1]))


def setting(where: Any, name: str, value: Any) -> Mutate:
    return lambda patch: patch.setattr(where, name, value)


def audited(check: Callable[[AuditedRunner], object]) -> Check:
    return lambda folder: check(AuditedRunner(decoder(folder, torch.float32)))


def check_drafting(folder: Path) -> None:
    runner = AuditedRunner(decoder(folder, torch.float32), max_nodes=TREE_CAPACITY)
    check_draft_session(runner, SamplingParams(seed=5, max_tokens=99), 30)


def check_several_sequences(folder: Path) -> None:
    check_ragged_forwards(make_runner(folder, num_sequences=MAX_SEQUENCES + 1))


def on_table(check: Callable[..., object], *arguments: Any) -> Check:
    return lambda _: check(*arguments)


MUTATIONS = [
    Mutation(
        name="a reused draw, by enumeration",
        mutate=setting(request_run, "row_positions", reused_draw),
        check=on_table(check_law, "coupled chain", 2),
        caught_by=f"{LAWS}::test_enumerated_law_equals_the_target_s",
    ),
    *(
        Mutation(
            name=f"a reused draw, sampled, {shape}",
            mutate=setting(sampling, "row_positions", reused_draw),
            check=on_table(check_sampled_law, shape),
            caught_by=f"{LAWS}::test_sampled_law_within_chance",
        )
        for shape in SHAPES
    ),
    Mutation(
        name="noise off by one position",
        mutate=setting(request_run, "row_positions", off_by_one),
        check=on_table(check_identity, SEEDED, 2),
        caught_by=f"{LAWS}::test_seeded_output_is_the_definition_s_for_every_length_and_drafter",
    ),
    Mutation(
        name="swapped sibling KV",
        mutate=swap_siblings,
        check=audited(check_rows_are_paths),
        caught_by=f"{MODELS}::test_a_node_s_logits_are_those_of_its_path_alone",
    ),
    Mutation(
        name="EOS unchecked",
        mutate=setting(request_run, "StopChecker", NoEos),
        check=on_table(check_eos),
        caught_by=f"{SCENARIOS}::test_output_ends_at_the_first_committed_eos",
    ),
    Mutation(
        name="EOS unchecked inside the accepted path",
        mutate=setting(request_run, "StopChecker", LastTokenOnly),
        check=on_table(check_eos),
        caught_by=f"{SCENARIOS}::test_output_ends_at_the_first_committed_eos",
    ),
    Mutation(
        name="a missing penalty along the path",
        mutate=setting(sampling._Penalties, "_count", count_history_only),
        check=on_table(check_answers, "greedy with penalties"),
        caught_by=f"{SCENARIOS}::test_sampling_parameters_mean_the_same_with_any_drafter",
    ),
    Mutation(
        name="min_tokens not counted along the path",
        mutate=setting(sampling, "row_positions", pathless_positions),
        check=on_table(check_answers, "stop ids"),
        caught_by=f"{SCENARIOS}::test_sampling_parameters_mean_the_same_with_any_drafter",
    ),
    Mutation(
        name="keys padded to the batch's maximum",
        mutate=setting(batch, "_canonical_groups", pad_to_batch),
        check=audited(check_rows_are_paths),
        caught_by=f"{MODELS}::test_a_node_s_logits_are_those_of_its_path_alone",
    ),
    Mutation(
        name="a sequence's attention given to another's rows",
        mutate=unshifted_groups,
        check=check_several_sequences,
        caught_by="tests/golden/test_ragged_forward.py::test_rows_are_the_same_as_alone",
    ),
    Mutation(
        name="accepted KV taken from the wrong slot",
        mutate=commit_by_depth,
        check=audited(check_kv_after_commits),
        caught_by=f"{MODELS}::test_kv_after_every_commit_is_a_fresh_prefill_s",
    ),
    Mutation(
        name="accepted KV moved to the wrong slot",
        mutate=commit_one_too_far,
        check=audited(check_kv_after_commits),
        caught_by=f"{MODELS}::test_kv_after_every_commit_is_a_fresh_prefill_s",
    ),
    Mutation(
        name="accepted KV moved to the wrong slot, under an engine",
        mutate=commit_backwards,
        check=lambda folder: check_model_identity(
            folder, torch.float32, SamplingParams(temperature=0.0, max_tokens=13), 28
        ),
        caught_by=f"{MODELS}::test_answers_and_kv_with_every_drafter",
    ),
    Mutation(
        name="a draft session's KV moved to the wrong slot",
        mutate=commit_by_depth,
        check=check_drafting,
        caught_by=f"{MODELS}::test_a_draft_session_is_what_a_fresh_one_would_be",
    ),
    Mutation(
        name="unverified tokens accepted",
        mutate=setting(coupled, "match", accept_everything),
        check=on_table(check_identity, GREEDY, 2),
        caught_by=f"{SCENARIOS}::test_greedy_output_has_the_exact_length_and_tokens",
    ),
    Mutation(
        name="right tokens accepted below wrong parents",
        mutate=setting(coupled, "match", accept_orphans),
        check=on_table(check_identity, GREEDY, 2),
        caught_by=f"{SCENARIOS}::test_greedy_output_has_the_exact_length_and_tokens",
    ),
    Mutation(
        name="the last window not cut at max_tokens",
        mutate=setting(request_run, "StopChecker", WholeWindows),
        check=on_table(check_identity, GREEDY, 2),
        caught_by=f"{SCENARIOS}::test_greedy_output_has_the_exact_length_and_tokens",
    ),
    Mutation(
        name="stop strings not found across tokens",
        mutate=setting(request_run, "StopChecker", NoStraddling),
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
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_named_check_fails(
    mutation: Mutation, make_model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model_folder("llama")
    mutation.check(folder)
    mutation.mutate(monkeypatch)
    with pytest.raises(AssertionError):
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
