"""Journals and stats files damaged at random: never a crash, never a wrong row."""

import json
import random
import resource
import zlib
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from nanovllm_cli.exit_code import CommandError
from nanovllm_cli.finished import JobRecord
from nanovllm_cli.journal import Journal, Kind, NotAJournal

from .job_folder import JobFolder, mixed_rows
from .test_journal import Rows, content, kept, make

Damage = Callable[[bytes, random.Random], bytes]


def _lines(data: bytes) -> list[bytes]:
    return data.splitlines(keepends=True)


def _with_crc(record: bytes) -> bytes:
    return b"%08x %b\n" % (zlib.crc32(record), record)


def flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 3, 30))):
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def truncate(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def lose_the_start(data: bytes, chance: random.Random) -> bytes:
    return data[chance.randrange(len(data)) :]


def zero(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data))
    end = min(start + chance.choice((1, 100, 4096)), len(data))
    return data[:start] + bytes(end - start) + data[end:]


def cut_out(data: bytes, chance: random.Random) -> bytes:
    start, end = sorted(chance.randrange(len(data)) for _ in range(2))
    return data[:start] + data[end:]


def insert_bytes(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + chance.randbytes(chance.choice((1, 50, 5000))) + data[at:]


def insert_newlines(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 5))):
        changed[chance.randrange(len(changed))] = ord("\n")
    return bytes(changed)


def duplicate(data: bytes, chance: random.Random) -> bytes:
    lines = _lines(data)
    for _ in range(chance.choice((1, 5))):
        lines.insert(chance.randrange(1, len(lines) + 1), lines[chance.randrange(len(lines))])
    return b"".join(lines)


def swap(data: bytes, chance: random.Random) -> bytes:
    header, *lines = _lines(data)
    chance.shuffle(lines)
    return header + b"".join(lines)


def splice(data: bytes, chance: random.Random) -> bytes:
    lines = _lines(data)
    one, other = chance.choice(lines), chance.choice(lines)
    mixed = one[: chance.randrange(len(one))] + other[chance.randrange(len(other)) :]
    lines.insert(chance.randrange(1, len(lines) + 1), mixed)
    return b"".join(lines)


def append_itself(data: bytes, chance: random.Random) -> bytes:
    return data + data[chance.randrange(len(data)) :]


# A row that no run can have written, though its sum is right: not digits, no key, no end.
BOGUS = (
    b"%032x r 99999999999999999999999 {}",
    b"%032x r 999999999999999999 {}",
    b"%032x r 4000000000 {}",
    b"%032x r -5 {}",
    b"%032x r +3 {}",
    b"%032x r 1_0 {}",
    b"%032x r 0x10 {}",
    b"%032x r 03 {}",
    b"%032x r  3 {}",
    b"%032x r 3",
    b"%032x x 3 {}",
    b"%032x",
    b"%032X r 3 {}",
    b"-%031x r 3 {}",
    b"",
    b" ",
    b"owner",
    b"%032x r \xd9\xa3 {}",
)


def bogus_with_crc(data: bytes, chance: random.Random) -> bytes:
    lines = _lines(data)
    text = chance.choice(BOGUS)
    record = text % chance.getrandbits(120) if b"%" in text else text
    lines.insert(chance.randrange(1, len(lines) + 1), _with_crc(record))
    return b"".join(lines)


def bogus_without_crc(data: bytes, chance: random.Random) -> bytes:
    lines = _lines(data)
    line = b"%08x " % chance.getrandbits(32) + chance.choice(BOGUS) + b"\n"
    lines.insert(chance.randrange(1, len(lines) + 1), line)
    return b"".join(lines)


def bogus_header(data: bytes, chance: random.Random) -> bytes:
    _, *lines = _lines(data)
    header = chance.choice(
        (
            {},
            [],
            None,
            {"nanovllm_journal": 1},
            {"nanovllm_journal": 1, "fingerprint": None},
            {"nanovllm_journal": 1, "fingerprint": {"seed": 0}},
            {"nanovllm_journal": 2, "fingerprint": {}},
            "x",
        )
    )
    content = chance.choice((orjson.dumps(header), b"{", b"\xff", b""))
    return b"".join([_with_crc(content), *lines])


DAMAGES: list[Damage] = [
    *(flip, truncate, lose_the_start, zero, cut_out, insert_bytes, insert_newlines, duplicate),
    *(swap, splice, append_itself, bogus_with_crc, bogus_without_crc, bogus_header),
]


def fault_of(path: Path, rows: Rows) -> str | None:
    """What is wrong with a damaged journal of `rows`: recovered, gone on with, recovered again."""
    for is_last in (False, True):
        try:
            journal = Journal.recover(path)
        except NotAJournal:
            return None  # its header is damaged, and the user is told
        found = content(journal)
        for row, value in found.items():
            if row not in rows or value != kept(rows)[row]:
                return f"row {row} is wrong"
        if is_last and found != kept(rows):
            return "a row is not there again"
        for row, (key, kind, line) in rows.items():
            if journal.kind(row) == Kind.MISSING:
                journal.append(row, key, kind, line)
        if content(journal) != kept(rows):
            return "a row is wrong after going on"
        journal.close()
    return None


def damage_journals(tmp_path: Path, number: int) -> tuple[int, list[str]]:
    """How many kinds were tried, and the faults that were found."""
    chance = random.Random(3)
    rows, _ = make(tmp_path / "whole", 60)
    whole = (tmp_path / "whole").read_bytes()
    faults, path = [], tmp_path / "j"
    for trial in range(number):
        damage = DAMAGES[trial % len(DAMAGES)]
        data = damage(whole, chance)
        if chance.random() < 0.2:
            data = chance.choice(DAMAGES[:-1])(data or b"\n", chance)
        path.write_bytes(data)
        try:
            fault = fault_of(path, rows)
        except Exception as error:
            fault = f"crash: {error!r}"
        if fault is not None:
            faults.append(f"{trial} {damage.__name__}: {fault}")
    return len(DAMAGES), faults


@pytest.mark.parametrize("number", [420, pytest.param(10_000, marks=pytest.mark.long)])
def test_no_damage_crashes_a_recovery_or_makes_a_wrong_row(number: int, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert damage_journals(tmp_path, number) == (14, [])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000  # KiB: a row number of 10 digits must not become memory


@pytest.mark.parametrize("content", [b"{}", b"[]", b'{"nanovllm_journal":1}', b"1", b"\xff"])
def test_a_header_that_lacks_what_it_must_have_is_73(content: bytes, tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "job", mixed_rows(10))
    folder.journal.write_bytes(_with_crc(content))
    error = folder.refused()
    assert error.exit_code == 73
    assert "out.jsonl.partial is not a journal" in error.message
    assert folder.journal.read_bytes() == _with_crc(content)
    assert folder.run(restart=True)[0] == 3


def _damaged_value(value: object, chance: random.Random) -> object:
    others = (None, [], {}, "", "x", -1, 1.5, True, 10**18, "0-999999999999", ["x"], {"a": 1})
    return chance.choice([other for other in others if other != value])


def _code_of(folder: JobFolder) -> int:
    try:
        return folder.done()
    except CommandError as error:
        return int(error.exit_code)


@pytest.mark.parametrize("number", [300, pytest.param(3000, marks=pytest.mark.long)])
def test_no_damage_to_a_stats_file_crashes_a_run(number: int, tmp_path: Path) -> None:
    chance = random.Random(4)
    folder = JobFolder(tmp_path / "job", mixed_rows(10))
    folder.run()
    path = folder.path / "out.jsonl.stats.json"
    whole = path.read_bytes()
    record = JobRecord.parse(whole)
    assert record is not None
    codes = set()
    for trial in range(number):
        stats = json.loads(whole)
        if trial % 2:
            part = chance.choice((stats, stats["resume"], stats["rows"]))
            name = chance.choice(sorted(part))
            if chance.random() < 0.3:
                del part[name]
            else:
                part[name] = _damaged_value(part[name], chance)
            data = json.dumps(stats).encode()
        else:
            data = chance.choice(DAMAGES[:8])(whole, chance)
        found = JobRecord.parse(data)
        if found is not None:
            assert found.num_completed + len(found.failed_rows) <= found.num_rows
        if trial % 20 == 0:
            path.write_bytes(data)
            codes.add(_code_of(folder))
    assert codes <= {3, 73, 78}  # as if the output were another's, or of another job
    assert len(codes) > 1
