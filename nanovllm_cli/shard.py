"""Shard: the part of a job's rows that one of several runs takes."""

from dataclasses import dataclass

from nanovllm_cli.core.errors import UserError

_MAX_DIGITS = 9


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Every `count`-th row, so that the shards of a sorted input are alike; by default all rows."""

    index: int = 0  # from 0; on the command line from 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From i/N with 1 <= i <= N; raises UserError."""
        first, slash, count = text.partition("/")
        is_short = len(first) <= _MAX_DIGITS >= len(count)
        is_number = slash and first.isdecimal() and count.isdecimal() and is_short
        if is_number and 1 <= int(first) <= int(count):
            return cls(index=int(first) - 1, count=int(count))
        raise UserError(
            f"--shard is {text!r}; it must be i/N with 1 <= i <= N, of at most {_MAX_DIGITS} "
            "digits",
            "1/8 to 8/8 are the shards of 8.",
        )

    def has(self, row: int) -> bool:
        """Whether the row of this number is in the shard."""
        return row % self.count == self.index

    def size(self, num_rows: int) -> int:
        """How many of `num_rows` rows are in the shard."""
        return len(range(self.index, num_rows, self.count))
