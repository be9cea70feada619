"""Faults that ``unit/test_mutations.py`` puts into the engine on purpose."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from outrider.actors import model_runner
from outrider.actors.feed import Feed
from outrider.actors.growth_tally import Tally
from outrider.actors.transport import Received
from outrider.kernels.native import library
from outrider.kernels.path_attention import PathKeys
from outrider.kernels.tree_attention import AttentionGroup
from outrider.models import batch
from outrider.models.batch import Rows
from outrider.models.block_pool import blocks_for
from outrider.models.kv_cache import KVSequence
from outrider.models.numerics import RowClasses
from outrider.speculation.replication.messages import Growth
from outrider.speculation.replication.replica import NO_POSITION, Replica
from outrider.speculation.sampling_params import SamplingParams
from outrider.speculation.stopping import StopChecker, StopOutcome
from outrider.speculation.tree import DraftTree
from outrider.speculation.types import FinishReason, FloatArray, IntArray, Verdict


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

    def swapped(*arguments: Any, **settings: Any) -> Rows:
        rows = original(*arguments, **settings)
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
            shared=batch._prefix(rows, int(prefix.max())),
            tail_slots=torch.from_numpy(slots.reshape(-1)),
            tail_mask=torch.from_numpy(mask[:, None]).to(dtype),
        )
    ]


def groups_padded_to_batch(patch: pytest.MonkeyPatch) -> None:
    """See ``pad_to_batch``; where PyTorch attends."""
    patch.setattr(library, "layers", lambda _: None)
    patch.setattr(batch, "_canonical_groups", pad_to_batch)


def unshifted_groups(patch: pytest.MonkeyPatch) -> None:
    """Every part's attention is that of the forward's first rows; where PyTorch attends."""
    patch.setattr(library, "layers", lambda _: None)
    original = batch._shifted
    patch.setattr(batch, "_shifted", lambda group, _: original(group, 0))


def everyones_table(patch: pytest.MonkeyPatch) -> None:
    """Every row finds its text through the first sequence's table."""
    _change_keys(patch, lambda keys: replace(keys, table_starts=np.zeros_like(keys.table_starts)))


def neighbours_path(patch: pytest.MonkeyPatch) -> None:
    """A row attends the last node of the row before in place of its own."""

    def shifted(keys: PathKeys) -> PathKeys:
        last = keys.node_starts[1:][np.diff(keys.node_starts) > 0] - 1
        nodes = keys.nodes.copy()
        nodes[last[1:]] = keys.nodes[last[:-1]]
        return replace(keys, nodes=nodes)

    _change_keys(patch, shifted)


def text_seen_short(patch: pytest.MonkeyPatch) -> None:
    """Rows of a tree leave out the root."""

    def shortened(keys: PathKeys) -> PathKeys:
        return replace(keys, seen=keys.seen - (np.diff(keys.node_starts) > 0))

    _change_keys(patch, shortened)


def _change_keys(patch: pytest.MonkeyPatch, change: Callable[[PathKeys], PathKeys]) -> None:
    original = batch._by_path

    def changed(parts: Sequence[Rows], window: int | None) -> tuple[IntArray, IntArray, IntArray, PathKeys]:
        *own, keys = original(parts, window)
        return *own, change(keys)

    patch.setattr(batch, "_by_path", changed)


def commit_by_depth(patch: pytest.MonkeyPatch) -> None:
    """Takes the first nodes' entries, which lie where the text goes on, for the accepted ones'."""
    original = KVSequence.keep

    def kept(self: KVSequence, sources: IntArray) -> None:
        original(self, self.slots(self.length, self.length + len(sources)))

    patch.setattr(KVSequence, "keep", kept)


def commit_one_too_far(patch: pytest.MonkeyPatch) -> None:
    """Moves the accepted entries one position too far."""
    original = KVSequence.keep

    def moved(self: KVSequence, sources: IntArray) -> None:
        assert self.reserve(self.length + 1 + len(sources))
        self.length += 1
        original(self, sources)
        self.length -= 1

    patch.setattr(KVSequence, "keep", moved)


def commit_backwards(patch: pytest.MonkeyPatch) -> None:
    original = KVSequence.keep
    patch.setattr(KVSequence, "keep", lambda self, sources: original(self, sources[::-1].copy()))


def publish_early(patch: pytest.MonkeyPatch) -> None:
    """Publishes blocks that are reserved and not committed yet."""
    original = KVSequence.publish

    def published(self: KVSequence, tokens: IntArray) -> None:
        length, self.length = self.length, min(self.room, len(tokens))
        original(self, tokens)
        self.length = length

    patch.setattr(KVSequence, "publish", published)


def share_all_blocks(self: KVSequence, length: int) -> KVSequence:
    """A fork that also shares the block that both will write into."""
    child, blocks = KVSequence(self._cache), self.blocks[: blocks_for(length)]
    self._cache.blocks.share(blocks)
    child._hold(blocks, 0)
    child.length = length
    return child


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


def accept_any_generation(patch: pytest.MonkeyPatch) -> None:
    original = Feed.receive

    def received(self: Feed, arrived: list[Received]) -> Tally:
        growths = [each.event for each in arrived if isinstance(each.event, Growth)]
        return original(self, [Received(replace(each, generation=self._generation), 1) for each in growths])

    patch.setattr(Feed, "receive", received)


def on_arrays(fault: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """A fault of the reference, which then does all the work."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(library, "grafter", lambda *_, **__: None)
        fault(patch)

    return mutate


def drop_what_crossed(self: Replica, forest: Any) -> None:  # noqa: ARG001
    """Growth from before the last commit is dropped, though it may agree with it."""
    forest.own_positions = np.full(len(forest.tokens), NO_POSITION)


def shift_aliases(patch: pytest.MonkeyPatch) -> None:
    original = Replica._position_of

    def shifted(self: Replica, births: IntArray) -> IntArray:
        positions = original(self, births)
        return np.where(positions == NO_POSITION, NO_POSITION, positions + 1)

    patch.setattr(Replica, "_position_of", shifted)


def skip_gaps(patch: pytest.MonkeyPatch) -> None:
    original = Replica._is_next

    def skipped(self: Replica, message: Growth) -> bool:
        self._next_id = max(self._next_id, message.first_id)
        return original(self, message)

    patch.setattr(Replica, "_is_next", skipped)
