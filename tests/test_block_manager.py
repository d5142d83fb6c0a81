"""Blocks, reference counts and prefix hashes, one by one and under random operations."""

from collections import Counter

import numpy as np
import pytest
import xxhash
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nanovllm_cli.core.block_manager import SCRATCH_BLOCK, BlockManager
from nanovllm_cli.core.request import TokenIds

BLOCK_SIZE = 2


def ids(*tokens: int) -> TokenIds:
    return np.array(tokens, dtype=np.int32)


def manager(num_blocks: int = 8, *, is_caching: bool = True, hash_bits: int = 64) -> BlockManager:
    return BlockManager(
        num_blocks, BLOCK_SIZE, enable_prefix_caching=is_caching, hash_bits=hash_bits
    )


def hashes_of(blocks: BlockManager, token_ids: TokenIds) -> list[int]:
    hashes: list[int] = []
    blocks.hash_blocks(token_ids, hashes)
    return hashes


def find(blocks: BlockManager, token_ids: TokenIds) -> list[int]:
    return blocks.find_prefix(token_ids, hashes_of(blocks, token_ids))


def publish(blocks: BlockManager, block_table: list[int], token_ids: TokenIds) -> None:
    hashes = hashes_of(blocks, token_ids)
    blocks.publish(block_table, token_ids, hashes, 0, len(token_ids) // BLOCK_SIZE)


def hold_published(blocks: BlockManager, token_ids: TokenIds) -> list[int]:
    """A new sequence's blocks, all computed: what a prefill without a hit would leave behind."""
    block_table = blocks.allocate(blocks.num_blocks_for(len(token_ids)))
    publish(blocks, block_table, token_ids)
    return block_table


def test_the_scratch_block_is_never_handed_out() -> None:
    blocks = manager(5)
    assert blocks.num_free_blocks == 4
    assert sorted(blocks.allocate(4)) == [1, 2, 3, 4]
    assert blocks.num_free_blocks == 0


def test_blocks_are_counted_up() -> None:
    blocks = manager()
    assert [blocks.num_blocks_for(n) for n in (0, 1, 2, 3, 4, 5)] == [0, 1, 1, 2, 2, 3]


def test_a_hash_is_chained_xxh3_over_the_tokens_as_int32() -> None:
    hashes = hashes_of(manager(), ids(7, 8, 9, 10, 11))
    first = xxhash.xxh3_64_intdigest(ids(7, 8).tobytes(), seed=0)
    assert hashes == [first, xxhash.xxh3_64_intdigest(ids(9, 10).tobytes(), seed=first)]


def test_hashes_are_extended_and_not_computed_again() -> None:
    blocks = manager()
    hashes = hashes_of(blocks, ids(1, 2, 3, 4))
    blocks.hash_blocks(ids(1, 2, 3, 4, 5), hashes)
    assert len(hashes) == 2
    blocks.hash_blocks(ids(1, 2, 3, 4, 5, 6), hashes)
    assert hashes == hashes_of(blocks, ids(1, 2, 3, 4, 5, 6))


def test_only_a_whole_published_prefix_is_found() -> None:
    blocks = manager()
    table = hold_published(blocks, ids(1, 2, 3, 4))
    assert find(blocks, ids(1, 2, 3, 4, 5)) == table
    assert find(blocks, ids(1, 2, 3, 5, 5)) == table[:1]
    assert find(blocks, ids(2, 2, 3, 4, 5)) == []
    assert find(blocks, ids(3, 4, 5)) == []  # the same tokens, but not at the beginning


def test_one_token_is_always_left_to_compute() -> None:
    blocks = manager()
    table = hold_published(blocks, ids(1, 2, 3, 4))
    assert find(blocks, ids(1, 2, 3, 4)) == table[:1]
    assert find(blocks, ids(1, 2)) == []
    assert find(blocks, ids(1)) == []


def test_finding_takes_nothing() -> None:
    blocks = manager()
    table = hold_published(blocks, ids(1, 2))
    blocks.release(table)
    assert find(blocks, ids(1, 2, 3)) == table
    assert blocks.num_free_blocks == 7


def test_a_freed_block_keeps_its_content_until_it_is_taken_for_something_else() -> None:
    blocks = manager(4)
    table = hold_published(blocks, ids(1, 2))
    blocks.release(table)
    others = blocks.allocate(2)
    assert find(blocks, ids(1, 2, 3)) == table
    assert blocks.allocate(1) == table
    assert find(blocks, ids(1, 2, 3)) == []
    assert not set(others) & set(table)


def test_a_freed_block_can_be_taken_again_for_what_it_holds() -> None:
    blocks = manager()
    table = hold_published(blocks, ids(1, 2, 3, 4))
    blocks.release(table)
    assert blocks.num_free_among(table) == 2
    blocks.take(table)
    assert blocks.num_free_among(table) == 0
    assert blocks.num_free_blocks == 5
    assert not set(blocks.allocate(5)) & set(table)


def test_a_shared_block_is_free_only_when_its_last_holder_gives_it_back() -> None:
    blocks = manager()
    table = hold_published(blocks, ids(1, 2))
    blocks.take(table)
    blocks.release(table)
    assert blocks.num_free_blocks == 6
    blocks.release(table)
    assert blocks.num_free_blocks == 7


def test_free_blocks_are_taken_in_the_order_of_least_recent_use() -> None:
    blocks = manager(7)
    tables = [hold_published(blocks, ids(i, i)) for i in range(6)]
    for i in (3, 0, 5, 1, 4, 2):
        blocks.release(tables[i])
    blocks.take(tables[0])
    blocks.release(tables[0])  # used again: now the most recent
    assert blocks.allocate(6) == [tables[i][0] for i in (3, 5, 1, 4, 2, 0)]


def test_the_last_block_of_a_sequence_is_reused_before_its_first() -> None:
    blocks = manager(4)
    table = hold_published(blocks, ids(1, 2, 3, 4, 5, 6))
    blocks.release(table)
    assert blocks.allocate(1) == table[2:]
    assert find(blocks, ids(1, 2, 3, 4, 5, 6)) == table[:2]
    assert blocks.allocate(2) == [table[1], table[0]]


def test_free_blocks_that_hold_nothing_of_use_are_taken_first() -> None:
    blocks = manager(4)
    table = hold_published(blocks, ids(1, 2))
    other = blocks.allocate(2)
    blocks.release(table)
    blocks.release(other)
    assert set(blocks.allocate(2)) == set(other)
    assert find(blocks, ids(1, 2, 3)) == table


def test_what_is_published_twice_keeps_its_first_block() -> None:
    blocks = manager()
    first = hold_published(blocks, ids(1, 2, 3, 4))
    second = hold_published(blocks, ids(1, 2, 3, 4))
    assert find(blocks, ids(1, 2, 3, 4, 5)) == first
    blocks.release(second)
    assert find(blocks, ids(1, 2, 3, 4, 5)) == first


def test_a_block_computed_after_the_second_copy_of_a_prefix_is_found_after_the_first() -> None:
    blocks = manager()
    first = hold_published(blocks, ids(1, 2))
    second = hold_published(blocks, ids(1, 2, 3, 4))
    assert find(blocks, ids(1, 2, 3, 4, 5)) == [first[0], second[1]]


def test_a_block_is_not_found_after_another_prefix_than_it_was_computed_after() -> None:
    num_chances = 0
    for first in range(1, 200):
        blocks = manager(hash_bits=3)
        one, other = ids(0, 0, 7, 7, 1), ids(first, 0, 7, 7, 1)
        table = hold_published(blocks, one[:4])
        parent = hold_published(blocks, other[:2])
        if find(blocks, one) != table or find(blocks, other[:3]) != parent:
            continue  # a first block and another collide
        num_chances += hashes_of(blocks, one)[1] == hashes_of(blocks, other)[1]
        assert find(blocks, other) == parent  # the block of 7, 7 has other KV than ours would have
    assert num_chances > 5


def test_a_parent_overwritten_since_is_not_mistaken_for_what_it_was() -> None:
    blocks = manager(4)
    table = hold_published(blocks, ids(1, 2, 3, 4))
    blocks.take(table[1:])  # the second block stays
    blocks.release(table)
    while table[0] not in (taken := blocks.allocate(1)):
        pass
    publish(blocks, taken, ids(9, 9))  # other content in the first
    assert find(blocks, ids(9, 9, 3, 4, 5)) == taken


def test_without_prefix_caching_nothing_is_hashed_or_found() -> None:
    blocks = manager(is_caching=False)
    token_ids = ids(1, 2, 3, 4)
    blocks.publish(blocks.allocate(2), token_ids, [], 0, 2)
    assert hashes_of(blocks, token_ids) == []
    assert find(blocks, token_ids) == []


def test_allocating_more_than_is_free_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="num_free_blocks"):
        manager(3).allocate(3)


class Blocks(RuleBasedStateMachine):
    """Sequences come, grow and go; memory holds whole prefixes, as tuples."""

    def __init__(self, hash_bits: int, is_caching: bool) -> None:
        super().__init__()
        self.blocks = manager(9, hash_bits=hash_bits, is_caching=is_caching)
        self.memory: dict[int, tuple[int, ...]] = {}
        self.sequences: list[tuple[list[int], TokenIds, int]] = []  # table, tokens, published

    tokens = st.lists(st.integers(0, 1), min_size=1, max_size=9)

    @rule(tokens=tokens, num_computed=st.integers(0, 9))
    def admit(self, tokens: list[int], num_computed: int) -> None:
        token_ids = ids(*tokens)
        cached = find(self.blocks, token_ids)
        num_new = self.blocks.num_blocks_for(len(tokens)) - len(cached)
        if num_new + self.blocks.num_free_among(cached) > self.blocks.num_free_blocks:
            return
        for index, block_id in enumerate(cached):
            assert self.memory[block_id] == tuple(tokens[: (index + 1) * BLOCK_SIZE])
        assert len(cached) * BLOCK_SIZE < len(tokens)
        self.blocks.take(cached)
        table = cached + self.blocks.allocate(num_new)
        for block_id in table[len(cached) :]:
            self.memory.pop(block_id, None)
        self.sequences.append((table, token_ids, len(cached)))
        self.compute(len(self.sequences) - 1, num_computed)

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 99), num_computed=st.integers(1, 9))
    def compute(self, which: int, num_computed: int) -> None:
        which %= len(self.sequences)
        table, token_ids, first = self.sequences[which]
        end = min(max(num_computed // BLOCK_SIZE, first), len(token_ids) // BLOCK_SIZE)
        for index in range(first, end):
            self.memory[table[index]] = tuple(token_ids[: (index + 1) * BLOCK_SIZE].tolist())
        self.blocks.publish(table, token_ids, hashes_of(self.blocks, token_ids), first, end)
        self.sequences[which] = (table, token_ids, end)

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 99))
    def leave(self, which: int) -> None:
        self.blocks.release(self.sequences.pop(which % len(self.sequences))[0])

    @invariant()
    def every_reference_is_counted_and_every_block_is_free_or_held(self) -> None:
        held: Counter[int] = Counter()
        for table, _, _ in self.sequences:
            held.update(table)
        assert SCRATCH_BLOCK not in held
        assert self.blocks.num_free_blocks + len(held) == self.blocks.num_blocks - 1
        for block_id in range(1, self.blocks.num_blocks):
            assert self.blocks._reference_counts[block_id] == held[block_id]
            assert self.blocks.num_free_among([block_id]) == (held[block_id] == 0)


@pytest.mark.parametrize(
    ("hash_bits", "is_caching"), [(64, True), (2, True), (1, True), (0, True), (64, False)]
)
def test_random_operations_keep_every_count_and_find_only_what_is_there(
    hash_bits: int, is_caching: bool
) -> None:
    run_state_machine_as_test(
        lambda: Blocks(hash_bits, is_caching),
        settings=settings(max_examples=40, stateful_step_count=40),
    )
