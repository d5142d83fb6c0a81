"""KV blocks: who holds which, which are free, and which hold a prefix that can be used again.

A full block's content is named by a chained hash: xxh3_64 over its token ids as int32 bytes,
seeded by the hash of the block before it. A hash only finds a candidate. It counts as a hit when
the tokens are equal and the block before it is the very content this one was computed after, so
that a collision costs speed and never correctness.

A freed block keeps its content and can be hit until it is taken for something else; free blocks
are taken in the order of least recent use, those without a published content first. Block 0 is
never handed out: it is where padding and parked slots write.

The idea of hashed blocks is vLLM's: https://docs.vllm.ai/en/latest/design/prefix_caching.html.
"""

from collections import OrderedDict
from collections.abc import Iterable
from itertools import count
from typing import NamedTuple

import xxhash

from nanovllm_cli.core.request import TokenIds

SCRATCH_BLOCK = 0


class _Content(NamedTuple):
    """What a published block holds. Equal ids are equal content; an id is never used again, so a
    parent that has been overwritten since is not mistaken for what was there."""

    hash: int
    tokens: bytes
    id: int
    parent_id: int


_ROOT = _Content(hash=0, tokens=b"", id=0, parent_id=0)


class BlockManager:
    """Blocks 1 .. num_blocks - 1; knows no sequences and no tensors."""

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool, hash_bits: int = 64
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._hash_mask = (1 << hash_bits) - 1
        self._reference_counts = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(1, num_blocks))  # next to take first
        self._block_of_hash: dict[int, int] = {}
        self._contents: list[_Content | None] = [None] * num_blocks
        self._content_ids = count(_ROOT.id + 1)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds, whether they can be hit or not."""
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` positions."""
        return -(-num_tokens // self.block_size)

    def hash_blocks(self, token_ids: TokenIds, hashes: list[int]) -> None:
        """Extend `hashes`, one for each full block of `token_ids`, by those it does not have."""
        if not self.enable_prefix_caching:
            return
        parent = hashes[-1] if hashes else _ROOT.hash
        for index in range(len(hashes), len(token_ids) // self.block_size):
            parent = xxhash.xxh3_64_intdigest(self._tokens_of(token_ids, index), seed=parent)
            parent &= self._hash_mask
            hashes.append(parent)

    def find_prefix(self, token_ids: TokenIds, hashes: list[int]) -> list[int]:
        """The longest run of published blocks that `token_ids` begins with; takes none of them.

        At least one token is left over: a prefill must compute something to sample from.
        """
        found: list[int] = []
        parent_id = _ROOT.id
        for index in range(min(len(hashes), (len(token_ids) - 1) // self.block_size)):
            block_id = self._block_of_hash.get(hashes[index])
            if block_id is None:
                break
            content = self._contents[block_id]
            assert content is not None, "a hash in the map names a published block"
            if content.parent_id != parent_id or content.tokens != self._tokens_of(
                token_ids, index
            ):
                break
            found.append(block_id)
            parent_id = content.id
        return found

    def num_free_among(self, block_ids: Iterable[int]) -> int:
        """How many of `block_ids` would leave the free ones if they were taken."""
        return sum(self._reference_counts[block_id] == 0 for block_id in block_ids)

    def take(self, block_ids: Iterable[int]) -> None:
        """Hold published blocks, shared with whoever holds them already."""
        for block_id in block_ids:
            if self._reference_counts[block_id] == 0:
                del self._free[block_id]
            self._reference_counts[block_id] += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Hold blocks nobody holds; what they were published for is forgotten."""
        assert num_blocks <= len(self._free), "the caller asks num_free_blocks first"
        block_ids = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block_id in block_ids:
            self._reference_counts[block_id] = 1
            content = self._contents[block_id]
            if content is not None:
                if self._block_of_hash.get(content.hash) == block_id:
                    del self._block_of_hash[content.hash]
                self._contents[block_id] = None
        return block_ids

    def release(self, block_ids: list[int]) -> None:
        """Hold a sequence's blocks no longer; the last of them is reused first."""
        for block_id in reversed(block_ids):
            self._reference_counts[block_id] -= 1
            if self._reference_counts[block_id] == 0:
                self._free[block_id] = None
                if self._contents[block_id] is None:
                    self._free.move_to_end(block_id, last=False)

    def publish(
        self, block_table: list[int], token_ids: TokenIds, hashes: list[int], first: int, end: int
    ) -> None:
        """Let blocks `first` .. `end` - 1 of a block table be found by `find_prefix`.

        Their KV must be written by launches made so far or by the one being planned: launches run
        in order, and within one each layer stores all K and V before it reads any. A content that
        is published already keeps its first block.
        """
        if not self.enable_prefix_caching:
            return
        for index in range(first, end):
            block_id, block_hash = block_table[index], hashes[index]
            if self._contents[block_id] is not None:
                continue
            parent = self._contents[block_table[index - 1]] if index else _ROOT
            tokens = self._tokens_of(token_ids, index)
            twin_id = self._block_of_hash.get(block_hash)
            twin = self._contents[twin_id] if twin_id is not None else None
            if parent is None or (twin and (twin.tokens, twin.parent_id) != (tokens, parent.id)):
                break  # a collision here or before: this content can not be found
            content_id = twin.id if twin else next(self._content_ids)
            self._contents[block_id] = _Content(block_hash, tokens, content_id, parent.id)
            self._block_of_hash.setdefault(block_hash, block_id)

    def _tokens_of(self, token_ids: TokenIds, index: int) -> bytes:
        start = index * self.block_size
        return token_ids[start : start + self.block_size].tobytes()
