"""Which file an input is, and whether it still is what it was when the job first opened it.

An input is read several times: to check it, to see what an earlier run has done, to run its rows
and, where the output is Parquet, to copy its columns. Rows of two versions of a file must not meet.
"""

import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """A file's place on its disk, its size and when it was last written."""

    device: int
    inode: int
    num_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> "Identity":
        return cls(
            device=stat.st_dev,
            inode=stat.st_ino,
            num_bytes=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
        )

    def change_to(self, now: "Identity") -> str | None:
        """Say what has happened to a file that is `now` another than it was; None if nothing."""
        if (self.device, self.inode) != (now.device, now.inode):
            return "it was replaced by another file"
        if self.num_bytes != now.num_bytes:
            how = "grew" if now.num_bytes > self.num_bytes else "shrank"
            return f"it {how} from {self.num_bytes} to {now.num_bytes} bytes"
        return None if self.mtime_ns == now.mtime_ns else "it was written to"


@dataclass(slots=True)
class FirstLook:
    """What the job saw of an input when it opened and counted it first; None: not yet."""

    identity: Identity | None = None
    num_rows: int | None = None
