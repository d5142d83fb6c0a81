"""PrefixHomes: which replicas have lately had a prompt that begins alike.

A prefix is known by the hash of so many tokens. A collision, or a block that its replica has long
dropped, costs speed and nothing else: the replica's own cache compares tokens.
"""

from collections import OrderedDict

import xxhash

from nanovllm_cli.core.request import TokenIds

_NUM_BLOCKS = (16, 4, 1)  # of the prefixes looked at; a longer one in common says more
_MAX_PREFIXES = 1 << 16


class PrefixHomes:
    """The replicas, by number, that have had a prefix."""

    def __init__(self, block_size: int) -> None:
        self._lengths = [num_blocks * block_size for num_blocks in _NUM_BLOCKS]
        self._homes: OrderedDict[int, set[int]] = OrderedDict()  # the one used last at the end

    def prefixes_of(self, token_ids: TokenIds) -> tuple[int, ...]:
        """Hashes of what a prompt begins with, the longest first.

        At least one token follows a prefix: the last one of a prompt is always computed.
        """
        return tuple(
            xxhash.xxh3_64_intdigest(token_ids[:length].tobytes(), seed=length)
            for length in self._lengths
            if length < len(token_ids)
        )

    def find(self, prefixes: tuple[int, ...]) -> set[int]:
        """The replicas that have had the longest prefix which any has had."""
        for prefix in prefixes:
            if homes := self._homes.get(prefix):
                return homes
        return set()

    def add(self, prefixes: tuple[int, ...], replica: int) -> None:
        """A prompt goes to a replica."""
        for prefix in prefixes:
            self._homes.setdefault(prefix, set()).add(replica)
            self._homes.move_to_end(prefix)
        while len(self._homes) > _MAX_PREFIXES:
            self._homes.popitem(last=False)

    def forget(self, replica: int) -> None:
        """A replica has lost what it had."""
        for homes in self._homes.values():
            homes.discard(replica)
