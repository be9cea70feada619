"""Who owns which block of the KV pool, and what lies in it."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from instruments.kv_checks import check_forking, check_publishing, entries, make_cache, write

from outrider.models.block_pool import BLOCK, BlockPool, blocks_for, next_key
from outrider.models.kv_cache import NULL_SLOT, KVSequence, NodeArena
from outrider.speculation.errors import OutOfBlocksError


def test_blocks_are_disjoint_and_never_the_null_block() -> None:
    pool = BlockPool(10)
    first, second = pool.allocate(4), pool.allocate(6)
    assert first is not None
    assert second is not None
    assert sorted([*first, *second]) == list(range(1, 11))
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []


def test_freeing_twice_is_noticed() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(AssertionError, match="free already"):
        pool.release(blocks)


def test_a_leak_and_a_write_to_the_null_slot_are_noticed() -> None:
    cache = make_cache(4)
    sequence = KVSequence(cache)
    assert sequence.reserve(BLOCK + 1)
    with pytest.raises(AssertionError, match="2 KV blocks leaked"):
        cache.check_idle()
    cache.check([sequence.blocks])
    sequence.close()
    cache.check_idle()
    cache.pool[1, NULL_SLOT, 0, 0, 0] = 1
    with pytest.raises(AssertionError, match="null slot"):
        cache.check_idle()


def test_what_does_not_fit_takes_nothing() -> None:
    cache = make_cache(4)
    sequence = KVSequence(cache)
    assert sequence.reserve(BLOCK)
    assert not sequence.reserve(5 * BLOCK)
    assert (sequence.room, cache.blocks.num_free) == (BLOCK, 3)
    with pytest.raises(OutOfBlocksError, match="97 nodes do not fit: 3 blocks"):
        NodeArena(cache, 3 * BLOCK + 1)


def test_positions_lie_in_blocks_anywhere() -> None:
    cache = make_cache(8)
    one, other = KVSequence(cache), KVSequence(cache)
    for positions in (10, 33, 70):
        assert one.reserve(positions)
        assert other.reserve(positions)
    slots = one.slots(0, 70)
    assert len({*slots.tolist(), *other.slots(0, 70).tolist()}) == 140
    assert (slots // BLOCK).tolist() == [one.blocks[position // BLOCK] for position in range(70)]
    assert (slots % BLOCK).tolist() == [position % BLOCK for position in range(70)]
    assert one.slots(31, 34).tolist() == slots[31:34].tolist()


def test_accepted_nodes_move_behind_the_text_in_path_order() -> None:
    """Over a block's end, and where what is read lies where something else is written."""
    cache = make_cache(8)
    sequence = KVSequence(cache)
    write(cache, sequence, np.arange(1, 31))
    assert sequence.reserve(80)
    nodes = sequence.slots(30, 80)
    cache.pool[:, nodes] = torch.arange(100, 150).float()[None, :, None, None, None]
    sequence.keep(nodes[[1, 2, 3, 37]])
    assert entries(cache, sequence) == [*range(1, 31), 101, 102, 103, 137]
    sequence.keep(nodes[:0])
    assert sequence.length == 34
    sequence.shrink()
    assert len(sequence.blocks) == 2
    arena = NodeArena(cache, 40)
    cache.pool[:, arena.slots[35]] = 7.0
    sequence.keep(arena.slots[[35]])
    assert entries(cache, sequence)[-1] == 7
    arena.close()
    sequence.close()
    cache.check_idle()


def test_a_text_is_found_again_as_far_as_its_full_blocks_go() -> None:
    cache = make_cache(8)
    text = np.arange(1, 81)
    first = KVSequence(cache)
    write(cache, first, text)
    for length, found in ((80, 64), (64, 64), (63, 32), (31, 0)):
        again = KVSequence(cache)
        again.adopt(text[:length])
        assert again.length == found
        assert entries(cache, again) == text[:found].tolist()
        again.close()
    other = text.copy()
    other[40] = 99
    again = KVSequence(cache)
    again.adopt(other)
    assert again.length == 32
    again.close()
    first.close()
    cache.check_idle()
    again = KVSequence(cache)
    again.adopt(text)
    assert again.length == 64, "what nobody uses is kept until its place is needed"


def test_other_numerics_are_another_text() -> None:
    one = next_key(make_cache(2, "canonical").first_key, np.arange(BLOCK))
    other = next_key(make_cache(2, "fast").first_key, np.arange(BLOCK))
    assert one != other


def test_published_blocks_make_place_the_longest_unused_and_the_last_of_a_text_first() -> None:
    cache = make_cache(6)
    texts = [np.arange(start, start + 2 * BLOCK) for start in (0, 1000, 2000)]
    for text in texts:
        sequence = KVSequence(cache)
        write(cache, sequence, text)
        sequence.close()
    assert cache.blocks.num_free == 6
    filler = KVSequence(cache)
    assert filler.reserve(3 * BLOCK)
    lengths = []
    for text in texts:
        again = KVSequence(cache)
        again.adopt(text)
        lengths.append(again.length)
        again.close()
    assert lengths == [0, BLOCK, 2 * BLOCK]
    filler.close()
    cache.check_idle()


def test_speculative_entries_are_not_published() -> None:
    check_publishing()


def test_a_fork_shares_full_blocks_and_copies_the_rest() -> None:
    check_forking()


def test_a_fork_without_a_block_for_the_rest_takes_nothing() -> None:
    cache = make_cache(3)
    parent = KVSequence(cache)
    write(cache, parent, np.arange(1, 71))
    assert parent.fork(70) is None
    whole = parent.fork(64)
    assert whole is not None
    cache.check([parent.blocks, whole.blocks])


def test_blocks_behind_the_window_are_given_back_and_found_as_long_as_they_last() -> None:
    window, text = 40, np.arange(1, 201)
    cache = make_cache(8, window=window)
    sequence = KVSequence(cache)
    for length in (71, 72, 104, 200):
        write(cache, sequence, text[:length])
        behind = (length - window) // BLOCK
        assert len(sequence.blocks) == blocks_for(length) - behind
        # The row of the last token, taken back, would attend the last position of what lies behind.
        assert length - 1 - window + 1 >= behind * BLOCK
        assert entries(cache, sequence) == text[behind * BLOCK : length].tolist()
        cache.check([sequence.blocks])
    sequence.close()
    filler = KVSequence(cache)
    # The longest unused go first: what the window left behind when the text was shorter.
    assert filler.reserve(4 * BLOCK)
    again = KVSequence(cache)
    again.adopt(text)
    assert again.length == 192, "the last window is all that the rows behind it need"
    assert entries(cache, again) == text[128:192].tolist()
    cache.check([filler.blocks, again.blocks])
    again.close()
    filler.close()
    cache.check_idle()


def test_half_a_window_is_nothing_to_begin_with() -> None:
    text = np.arange(1, 129)
    cache = make_cache(4, window=64)
    sequence = KVSequence(cache)
    write(cache, sequence, text)
    sequence.close()
    filler = KVSequence(cache)
    assert filler.reserve(3 * BLOCK)
    again = KVSequence(cache)
    again.adopt(text)
    assert (again.length, again.blocks) == (0, [])


def test_a_fork_needs_what_its_rows_attend() -> None:
    cache = make_cache(12, window=40)
    text = np.arange(1, 161)
    parent = KVSequence(cache)
    write(cache, parent, text)
    assert not parent.can_fork(100)
    child = parent.fork(150)
    assert child is not None
    assert entries(cache, child) == text[96:150].tolist()
    cache.check([parent.blocks, child.blocks])
    parent.close()
    mine = np.append(text[:150], [500] * 40)
    write(cache, child, mine)
    assert entries(cache, child) == mine[128:].tolist()
    child.close()
    cache.check_idle()


@pytest.mark.parametrize(("slots", "blocks"), [(0, 0), (1, 1), (BLOCK, 1), (BLOCK + 1, 2)])
def test_blocks_for(slots: int, blocks: int) -> None:
    assert blocks_for(slots) == blocks


class Sequences(RuleBasedStateMachine):
    """Sequences over a small pool, against their texts as lists."""

    window: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.cache = make_cache(9, window=self.window)
        self.live: list[tuple[KVSequence, list[int]]] = []

    @rule(seed=st.integers(0, 2), length=st.integers(1, 100))
    def begin(self, seed: int, length: int) -> None:
        """Few distinct texts, so that many begin alike."""
        text = np.random.default_rng(seed).integers(1, 50, 100)[:length]
        sequence = KVSequence(self.cache)
        sequence.adopt(text)
        if sequence.reserve(length):
            write(self.cache, sequence, text)
            self.live.append((sequence, text.tolist()))
        else:
            sequence.close()

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99), tokens=st.lists(st.integers(1, 50), min_size=1, max_size=40))
    def go_on(self, which: int, tokens: list[int]) -> None:
        sequence, text = self.live[which % len(self.live)]
        if sequence.reserve(len(text) + len(tokens)):
            text += tokens
            write(self.cache, sequence, np.array(text))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99), length=st.integers(0, 150))
    def fork(self, which: int, length: int) -> None:
        sequence, text = self.live[which % len(self.live)]
        length = min(length, len(text))
        child = sequence.fork(length) if sequence.can_fork(length) else None
        if child is not None:
            self.live.append((child, text[:length]))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99))
    def end(self, which: int) -> None:
        sequence, _ = self.live.pop(which % len(self.live))
        sequence.close()

    @invariant()
    def everyone_holds_his_own_text(self) -> None:
        for sequence, text in self.live:
            behind = self.cache.blocks_behind(len(text))
            assert entries(self.cache, sequence) == text[behind * BLOCK :]
            assert len(sequence.blocks) <= blocks_for(sequence.room) - behind
        self.cache.check([sequence.blocks for sequence, _ in self.live])


class SlidingSequences(Sequences):
    """The same where rows attend the last 40 positions only."""

    window = 40


TestSequences, TestSlidingSequences = Sequences.TestCase, SlidingSequences.TestCase
for case in (TestSequences, TestSlidingSequences):
    case.settings = settings(derandomize=True, deadline=None, max_examples=60, stateful_step_count=30)
