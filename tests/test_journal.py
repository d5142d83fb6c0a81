"""The journal: what was appended is there again, whatever a crash or a bad disk did to the rest."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from nanovllm_cli import journal as journal_module
from nanovllm_cli.exit_code import CommandError
from nanovllm_cli.files import write_whole
from nanovllm_cli.journal import Journal, Kind, NotAJournal
from nanovllm_cli.shard import Shard

from .cli import ROOT, environment

HEADER = {"fingerprint": {"seed": "0"}}
Rows = dict[int, tuple[int, Kind, bytes]]  # row number -> key, kind, line


def make(path: Path, num_rows: int, *, seed: int = 0) -> tuple[Rows, list[int]]:
    """A journal of rows in random order, some of them failed; and where each record ends."""
    chance = random.Random(seed)
    rows = {
        row: (
            chance.getrandbits(128),
            Kind.FAILED if row % 5 == 2 else Kind.COMPLETED,
            b'{"id": %d, "text": "%b"}' % (row, b"r \\u00e9" * chance.randrange(9)),
        )
        for row in chance.sample(range(num_rows), num_rows)
    }
    journal = Journal(path, HEADER)
    ends = []
    for row, (key, kind, line) in rows.items():
        journal.append(row, key, kind, line)
        journal.flush()
        ends.append(path.stat().st_size)
    journal.close()
    return rows, ends


def content(journal: Journal) -> Rows:
    """What a journal has, its keys as far as it keeps them."""
    return {
        row: (journal.key(row), kind, line)
        for kind in (Kind.COMPLETED, Kind.FAILED)
        for row, line in journal.lines(kind)
    }


def kept(rows: Rows) -> Rows:
    return {row: (key % 2**64, kind, line) for row, (key, kind, line) in rows.items()}


def test_what_was_appended_is_there_again(tmp_path: Path) -> None:
    rows, _ = make(tmp_path / "j", 50)
    journal = Journal.recover(tmp_path / "j")
    assert content(journal) == kept(rows)
    assert journal.header == HEADER
    assert (journal.num_completed, journal.num_failed) == (40, 10)
    assert (journal.num_done, journal.end_row) == (50, 50)
    assert [row for row, _ in journal.lines(Kind.FAILED)] == list(range(2, 50, 5))
    journal.close()


def test_a_journal_that_was_recovered_goes_on(tmp_path: Path) -> None:
    rows, _ = make(tmp_path / "j", 20)
    for row in range(20, 25):
        journal = Journal.recover(tmp_path / "j")
        rows[row] = (row, Kind.COMPLETED, b"%d" % row)
        journal.append(row, *rows[row])
        assert content(journal) == kept(rows)
        journal.close()
    assert journal.num_done == 25


def test_there_is_no_file_before_the_first_row(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", HEADER)
    journal.flush()
    assert list(journal.lines(Kind.COMPLETED)) == []
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_row_may_run_again_and_the_later_result_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", HEADER)
    journal.append(0, 7, Kind.FAILED, b"bad")
    journal.append(1, 8, Kind.COMPLETED, b"good")
    journal.forget_failed()
    assert journal.kind(0) == Kind.MISSING
    assert (journal.num_done, journal.end_row) == (1, 2)
    journal.append(0, 9, Kind.COMPLETED, b"now good")
    journal.close()
    journal = Journal.recover(tmp_path / "j")
    assert list(journal.lines(Kind.COMPLETED)) == [(0, b"now good"), (1, b"good")]
    assert (journal.num_completed, journal.num_failed) == (2, 0)
    journal.close()


def test_a_completed_row_is_never_written_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", HEADER)
    journal.append(3, 7, Kind.COMPLETED, b"once")
    with pytest.raises(AssertionError, match="row 3 was done before"):
        journal.append(3, 7, Kind.COMPLETED, b"twice")
    journal.close()


def test_a_shard_keeps_memory_for_its_own_rows_only(tmp_path: Path) -> None:
    shard = Shard(index=4, count=1000)
    journal = Journal(tmp_path / "j", HEADER, shard=shard)
    for row in (5_000_004, 4, 1_000_004):
        journal.append(row, row, Kind.COMPLETED, b"%d" % row)
    assert len(journal._kinds) < 20_000
    journal.close()
    journal = Journal.recover(tmp_path / "j", shard=shard)
    assert list(journal.lines(Kind.COMPLETED)) == [
        (row, b"%d" % row) for row in (4, 1_000_004, 5_000_004)
    ]
    assert journal.rows(Kind.COMPLETED).tolist() == [4, 1_000_004, 5_000_004]
    assert journal.end_row == 5_000_005
    journal.close()


def recover_and_go_on(path: Path, rows: Rows) -> str | None:
    """What is wrong with a damaged journal of some of `rows` after it has gone on; None if nothing.

    The rows that it does not have are appended, as a resumed job does it, and all are read twice:
    from this journal and from a recovered one.
    """
    journal = Journal.recover(path)
    found = content(journal)
    if any(value != kept(rows)[row] for row, value in found.items()):
        return "a row is wrong"
    for row, (key, kind, line) in rows.items():
        if row not in found:
            journal.append(row, key, kind, line)
    journal.flush()
    if content(journal) != kept(rows):
        return "a row is wrong after going on"
    journal.close()
    again = Journal.recover(path)
    found = content(again)
    again.close()
    return None if found == kept(rows) else "a row is wrong after a second recovery"


def damages(path: Path, num_flips: int = 1) -> list[bytes]:
    """A small journal cut at every byte of its last two records, and with each of them flipped."""
    _, ends = make(path, 6)
    whole = path.read_bytes()
    last_two = range(ends[-3], ends[-1])
    cut = [whole[:at] for at in last_two]
    flipped = [
        whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :]
        for at in last_two
        for bit in range(8)[:: 8 // num_flips]
    ]
    return cut + flipped


def find_faults(tmp_path: Path, num_flips: int) -> tuple[int, set[str]]:
    rows, _ = make(tmp_path / "whole", 6)
    faults: set[str] = set()
    damaged = damages(tmp_path / "j", num_flips)
    for content_of_it in damaged:
        (tmp_path / "j").write_bytes(content_of_it)
        try:
            fault = recover_and_go_on(tmp_path / "j", rows)
        except CommandError as error:  # what is read is not what was written
            fault = str(error)
        if fault is not None:
            faults.add(fault)
    return len(damaged), faults


def test_no_torn_tail_and_no_flipped_bit_makes_a_wrong_row(tmp_path: Path) -> None:
    num_cases, faults = find_faults(tmp_path, num_flips=8)
    assert num_cases > 1500
    assert faults == set()


def test_damage_in_the_middle_costs_its_own_row_alone(tmp_path: Path) -> None:
    rows, ends = make(tmp_path / "j", 40)
    whole = bytearray((tmp_path / "j").read_bytes())
    whole[ends[10] + 60] ^= 1
    (tmp_path / "j").write_bytes(whole)
    lost = list(rows)[11]
    journal = Journal.recover(tmp_path / "j")
    assert content(journal) == kept({r: v for r, v in rows.items() if r != lost})
    journal.close()


def test_zeros_at_the_end_cost_nothing(tmp_path: Path) -> None:
    rows, _ = make(tmp_path / "j", 40)  # what a file system may leave after a power loss
    with open(tmp_path / "j", "ab") as file:
        file.write(bytes(100_000))
    journal = Journal.recover(tmp_path / "j")
    assert content(journal) == kept(rows)
    journal.append(40, 7, Kind.COMPLETED, b"more")
    journal.close()
    journal = Journal.recover(tmp_path / "j")
    assert content(journal) == {**kept(rows), 40: (7, Kind.COMPLETED, b"more")}
    journal.close()


# Each breaks one habit; the tests above must not be blind to it.
@pytest.mark.parametrize("mutant", ["no line", "no crc"])
def test_a_journal_without_one_of_its_habits_is_found_out(
    mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mutant == "no line":  # what comes next goes on the torn line
        monkeypatch.setattr(journal_module, "write_whole", without_blank_lines)
        monkeypatch.setattr(journal_module, "_new_claim", lambda: b"")
    else:
        monkeypatch.setattr(journal_module, "_parse_record", parse_without_crc)
    _, faults = find_faults(tmp_path, num_flips=1)
    assert faults


def without_blank_lines(descriptor: int, data: bytes) -> None:
    write_whole(descriptor, data.lstrip(b"\n"))


def parse_without_crc(line: bytes) -> tuple[int, Kind, int, int] | None:
    try:
        end = line.index(b" ", 44)
        kind = {b"r": Kind.COMPLETED, b"e": Kind.FAILED}[line[42:43]]
        return int(line[9:41], 16), kind, int(line[44:end]), end + 1
    except (ValueError, KeyError):
        return None


@pytest.mark.parametrize(
    "first_line",
    [b"", b"precious\n", b'{"prompt": "a"}\n', b"00000000 {}\n", b"e3e0d5ee {}", bytes(100)],
)
def test_a_file_that_is_no_journal_is_left_as_it_is(first_line: bytes, tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(first_line)
    with pytest.raises(NotAJournal):
        Journal.recover(tmp_path / "j")
    assert (tmp_path / "j").read_bytes() == first_line


def test_every_flipped_bit_of_the_header_is_seen(tmp_path: Path) -> None:
    make(tmp_path / "j", 2)
    whole = (tmp_path / "j").read_bytes()
    for at in range(whole.index(b"\n") + 1):
        for bit in range(8):
            flipped = whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :]
            (tmp_path / "j").write_bytes(flipped)
            with pytest.raises(NotAJournal):
                Journal.recover(tmp_path / "j")


LARGE = """
import resource, sys, time, zlib
from pathlib import Path
from nanovllm_cli.journal import Journal, Kind

path, num_rows = Path(sys.argv[1]), int(sys.argv[2])
small = Journal(path, {"fingerprint": {}})
small.append(0, 0, Kind.COMPLETED, b'{"id": 0}')
small.close()
with open(path, "ab") as file:
    for row in range(1, num_rows):
        record = b'%032x r %d {"id": %d}' % (row * 2654435761, row, row)
        file.write(b"%08x %b\\n" % (zlib.crc32(record), record))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.monotonic()
journal = Journal.recover(path)
assert journal.num_done == num_rows, journal.num_done
seconds = time.monotonic() - start
last = None
for last in journal.lines(Kind.COMPLETED):
    pass
assert last == (num_rows - 1, b'{"id": %d}' % (num_rows - 1)), last
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(grown / num_rows, seconds)
"""


def grown_bytes_per_row(path: Path, num_rows: int) -> float:
    ended = subprocess.run(
        [sys.executable, "-c", LARGE, path, str(num_rows)],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return float(ended.stdout.split()[0])


def test_a_recovered_row_takes_few_bytes(tmp_path: Path) -> None:
    assert grown_bytes_per_row(tmp_path / "j", 300_000) < 100  # a Python object would take more


@pytest.mark.long
def test_ten_million_rows_are_recovered_in_half_a_gigabyte(tmp_path: Path) -> None:
    assert grown_bytes_per_row(tmp_path / "j", 10_000_000) < 50


def test_a_private_journal_is_for_its_owner_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", HEADER, private=True)
    journal.append(0, 0, Kind.COMPLETED, b"x")
    assert (tmp_path / "j").stat().st_mode & 0o777 == 0o600
    journal.close()


FULL_DISK = """
import resource, sys
from pathlib import Path
from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.journal import Journal, Kind

path = Path(sys.argv[1])
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in range(0, 6400, 100):
    path.unlink(missing_ok=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    journal, taken = Journal(path, {"fingerprint": {}}), 0
    try:
        for row in range(100):
            journal.append(row, row, Kind.COMPLETED, b'{"id": %d, "text": "%032x"}' % (row, row))
            journal.flush()
            taken += 1
        raise SystemExit("the disk was never full")
    except CommandError as error:
        assert error.exit_code == ExitCode.IO_ERROR, error
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    journal.close()
    if not path.exists():
        assert taken == 0, taken
        continue
    assert path.read_bytes()[-1:] == b"\\n", "a torn record was left"
    journal = Journal.recover(path)
    assert journal.num_done == taken, (journal.num_done, taken)
    for row in range(taken, 100):
        journal.append(row, row, Kind.COMPLETED, b'{"id": %d, "text": "%032x"}' % (row, row))
    assert len([*journal.lines(Kind.COMPLETED)]) == 100
    journal.close()
"""


def test_a_full_disk_leaves_every_row_that_was_written_at_64_sizes(tmp_path: Path) -> None:
    arguments = [sys.executable, "-W", "error", "-c", FULL_DISK, tmp_path / "j"]
    ended = subprocess.run(arguments, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
