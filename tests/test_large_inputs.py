"""Small files that hold much: bounded memory, and time that is not that of each byte's row."""

import gzip
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from nanovllm_cli import parquet_input
from nanovllm_cli.feeder import to_prompts, tokenize
from nanovllm_cli.inputs import find_inputs
from nanovllm_cli.options import GenerateOptions
from nanovllm_cli.prompt_limit import max_text_bytes
from nanovllm_cli.prompt_options import PromptOptions
from nanovllm_cli.prompts import Prompt
from nanovllm_cli.row_key import row_key
from nanovllm_cli.rows import BadRow, Row, check_inputs, read_rows
from nanovllm_cli.tokenizer import PromptTokenizer

from .cli import MODEL, environment
from .fake_engine import FakeEngine
from .input_files import read
from .job_folder import JobFolder, good_rows

TEXT = "".join(random.Random(0).choices("abcdef ", k=4 << 20))
BASE_BYTES = 450e6  # of a command that has loaded torch and transformers


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def one_text_in(num_rows: int, path: str, **options: Any) -> str:
    """A file of a few megabytes, whose rows share a text of four."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * num_rows, pa.int32()), pa.array([TEXT]))
    table = pa.table({"id": range(num_rows), "prompt": texts})
    if options:
        table = table.cast(pa.schema([("id", pa.int64()), ("prompt", pa.string())]))
    pq.write_table(table, path, **options)
    return path


# What the kernel counts of a child begins with the memory of the process that started it.
MEASURED = """
import atexit, re
def tell():
    status = open("/proc/self/status").read()
    print("PEAK", re.search(r"VmHWM:\\s+(\\d+)", status)[1], file=open("/dev/stderr", "w"))
atexit.register(tell)
from nanovllm_cli.app import main
main()
"""


def ended(*arguments: str) -> tuple[int, int]:
    """The exit code of the command, and the most memory that it held."""
    command = [sys.executable, "-c", MEASURED, *arguments]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True)
    return run.returncode, int(run.stderr.rpartition("PEAK ")[2]) * 1024


def test_rows_that_share_a_large_text_take_the_memory_of_few() -> None:
    path = one_text_in(400, "in.parquet")
    code, peak = ended("generate", path, "--dry-run", "--model", str(MODEL))
    assert code == 3  # every row is too long
    assert peak < BASE_BYTES + 300e6


@pytest.mark.parametrize("kind", ["dictionary", "plain"])
def test_rows_with_a_large_text_are_what_they_are(kind: str) -> None:
    options: dict[str, Any] = {} if kind == "dictionary" else {"use_dictionary": False}
    count = 70 if kind == "dictionary" else 20
    rows = list(read_rows(find_inputs([one_text_in(count, "in.parquet", **options)])))
    assert [row.columns for row in rows if isinstance(row, Row)] == [
        {"id": at, "prompt": TEXT} for at in range(count)
    ]
    assert all(isinstance(row, Row) and row.num_bytes >= len(TEXT) for row in rows)
    # The key of earlier versions.
    keys = [
        xxhash.xxh3_128_intdigest(repr({"id": at, "prompt": TEXT}).encode())
        for at in (0, count - 1)
    ]
    assert [row_key(rows[0]), row_key(rows[-1])] == keys


def test_rows_that_become_large_after_small_ones_are_all_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parquet_input, "_LARGE_BATCH_BYTES", 1 << 20)
    texts = ["x" * (10 if at < 1000 else 20_000) for at in range(1500)]
    rows = {"id": range(1500), "prompt": texts, "none": [None] * 1500, "date": [b"\xff"] * 1500}
    pq.write_table(pa.table(rows), "in.parquet", row_group_size=1200)
    sources = find_inputs(["in.parquet"])
    assert check_inputs(sources) == 1500
    found = [row.columns for row in read_rows(sources) if isinstance(row, Row)]
    assert [row["id"] for row in found] == [*range(1500)]
    assert [row["prompt"] for row in found] == texts
    assert {(row["none"], row["date"]) for row in found} == {(None, b"\xff")}


def test_too_little_memory_for_parquet_is_no_damage() -> None:
    pq.write_table(pa.table({"prompt": ["x" * (128 << 20)]}), "in.parquet")
    script = """if True:
        import re, resource, sys
        from nanovllm_cli.core.errors import MemoryTooSmall
        from nanovllm_cli.exit_code import ExitCode
        from nanovllm_cli.inputs import find_inputs
        from nanovllm_cli.rows import check_inputs
        from nanovllm_cli.run_job import exit_code_of
        import nanovllm_cli.parquet_input
        kilobytes = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1])
        resource.setrlimit(resource.RLIMIT_AS, ((kilobytes << 10) + (100 << 20),) * 2)
        try:
            check_inputs(find_inputs(["in.parquet"]))
        except MemoryTooSmall as error:
            print(int(exit_code_of(error)), error.message)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("69 too little memory to read in.parquet"), done


def test_a_footer_that_counts_no_rows_is_as_good_whole_as_in_part() -> None:
    """As an early parquet-rs wrote it: 0 rows in the footer, and rows in its row groups."""
    pq.write_table(pa.table({"prompt": ["a", "b", "c", "d"]}), "in.parquet")
    content = Path("in.parquet").read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    footer = content[-8 - length : -8]
    # Thrift's compact form: field 3 (num_rows) is an i64, here 4 as a zigzag varint, and then
    # field 4, the list of row groups.
    assert footer.count(b"\x16\x08\x19\x1c") == 1
    changed = footer.replace(b"\x16\x08\x19\x1c", b"\x16\x00\x19\x1c")
    Path("in.parquet").write_bytes(content[: -8 - length] + changed + content[-8:])
    assert pq.ParquetFile("in.parquet").metadata.num_rows == 0
    sources = find_inputs(["in.parquet"])
    assert check_inputs(sources) == 4
    assert len(list(read_rows(sources))) == 4
    assert len(list(read_rows(sources, limit=3))) == 3


def test_blank_lines_cost_no_more_than_their_bytes() -> None:
    blank = b"\n" * (32 << 20)
    with gzip.open("in.jsonl.gz", "wb", 1) as file:
        for _ in range(4):
            file.write(blank)
        file.write(b'{"prompt": "x"}\n')
        for _ in range(4):
            file.write(blank)
        file.write(b'{"prompt": "y"}')
    sources = find_inputs(["in.jsonl.gz"])
    before = time.process_time()
    assert [row.line for row in read_rows(sources)] == [(128 << 20) + 1, (256 << 20) + 2]
    assert check_inputs(sources) == 2
    assert time.process_time() - before < 8  # 40 s where each line is looked at


@pytest.mark.parametrize("blank", [b"\n", b"\r\n", b"   \n", b"\t \r\n", b"\n \n"])
def test_lines_are_numbered_rightly_among_blank_ones(blank: bytes) -> None:
    rng = random.Random(3)
    parts, expected, number = [], [], 1
    for at in range(120):
        num_blank = rng.choice((0, 0, 1, 3, 200, 5000, 400_000 if at % 40 == 7 else 1))
        parts.append(blank * num_blank)
        number += num_blank * blank.count(b"\n")
        row = b'{"prompt":"%d"}' % at if at % 7 else b"{broken" + b" " * rng.choice((0, 300))
        parts.append(rng.choice((b"", b"  ")) + row + b"\n")
        expected.append((number, at % 7 > 0))
        number += 1
    found = read(b"".join(parts))
    assert [(row.line, isinstance(row, Row)) for row in found] == expected


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(MODEL)


def rows_of(*prompts: str, **more: Any) -> Iterator[Row | BadRow]:
    for at, prompt in enumerate(prompts):
        columns = {"prompt": prompt, **more}
        raw = orjson.dumps(columns)
        yield Row(index=at, source="s", line=at + 1, raw=raw, columns=columns, num_bytes=len(raw))


def test_large_rows_are_taken_a_few_at_a_time() -> None:
    sizes = [10] * 600 + [300_000] * 10 + [5_000_000] * 2 + [10] * 3
    chunks = list(to_prompts(rows_of(*("x" * size for size in sizes)), PromptOptions()))
    assert [len(chunk) for chunk in chunks] == [256, 256, 92, 4, 3, 1, 3]
    assert sum(map(len, chunks)) == len(sizes)


def test_a_text_beyond_any_number_of_tokens_is_not_tokenized(tokenizer: PromptTokenizer) -> None:
    class Watched(PromptTokenizer):
        longest = 0

        def encode(self, prompts: Any) -> Any:
            self.longest = max([self.longest, *(len(prompt.text or "") for prompt in prompts)])
            return super().encode(prompts)

    most = max_text_bytes(GenerateOptions(inputs=[]), MODEL, MODEL)
    assert most is not None
    given = [*rows_of("short", "x" * (most + 1), "x" * most, "\u4f60" * (most // 3 + 1))]
    (chunk,) = [[p for each in to_prompts(iter(given), PromptOptions()) for p in each]]
    watched = Watched(MODEL)
    fed = tokenize(chunk, watched, most)
    bad = [row for row in fed if isinstance(row, BadRow)]
    assert [(row.line, row.code) for row in bad] == [(2, "prompt_too_long"), (4, "prompt_too_long")]
    assert f"more than {most} bytes" in bad[0].message
    assert watched.longest == most
    # What is cut to its end is tokenized whole.
    (chunk,) = to_prompts(rows_of("x" * (most + 1), truncate_prompt_tokens=3), PromptOptions())
    assert not any(isinstance(row, BadRow) for row in tokenize(chunk, watched, most))
    cut = GenerateOptions(inputs=[], truncate_prompt_tokens=3)
    assert max_text_bytes(cut, MODEL, MODEL) is None


def test_no_text_that_fits_is_beyond_the_limit(tokenizer: PromptTokenizer) -> None:
    """The likeliest to: the longest tokens, and characters that composition makes shorter."""
    config = orjson.loads((MODEL / "config.json").read_bytes())
    most = max_text_bytes(GenerateOptions(inputs=[]), MODEL, MODEL)
    assert most is not None
    bytes_per_token = most // config["max_position_embeddings"]
    names = sorted(orjson.loads((MODEL / "tokenizer.json").read_bytes())["model"]["vocab"], key=len)
    longest = tokenizer.token_texts[tokenizer._full.token_to_id(names[-1])].text
    for text in (longest * 200, "\u1112\u1161\u11ab" * 300, "\u03b1\u0313\u0301\u0345" * 300):
        (prompt,) = [p for chunk in to_prompts(rows_of(text), PromptOptions()) for p in chunk]
        assert isinstance(prompt, Prompt)
        (token_ids,) = tokenizer.encode([prompt])
        assert isinstance(token_ids, list)
        assert len(text.encode()) <= len(token_ids) * bytes_per_token


def test_a_tokenizer_that_leaves_characters_out_sets_no_limit(tmp_path: Path) -> None:
    content = orjson.loads((MODEL / "tokenizer.json").read_bytes())
    for changed in (
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"normalizer": {"type": "Strip"}},
        {"model": {**content["model"], "type": "WordPiece"}},
        {"model": 1},
    ):
        (tmp_path / "tokenizer.json").write_bytes(orjson.dumps({**content, **changed}))
        assert max_text_bytes(GenerateOptions(inputs=[]), MODEL, tmp_path) is None


def test_rows_in_flight_are_bounded_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counting(FakeEngine):
        most = 0

        def step(self) -> Any:
            self.most = max(self.most, len(self._waiting))
            return super().step()

    rows = [{**row, "data": "x" * 1000} for row in good_rows(40)]
    folder = JobFolder(tmp_path / "job", rows)
    few, many = Counting(), Counting()
    folder.run(many)
    assert many.most == 32
    before = folder.output.read_bytes()
    monkeypatch.setattr("nanovllm_cli.options._BYTES_IN_FLIGHT", 4 * 1000)
    folder.run(few, restart=True)
    assert few.most == 4
    monkeypatch.setattr("nanovllm_cli.options._BYTES_IN_FLIGHT", 1)
    folder.run(few := Counting(), restart=True)
    assert few.most == 1  # but one there is always
    assert folder.output.read_bytes() == before
