"""Shards: together they are one run, to the byte; and only all of them, of one job, are merged."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm_cli import pipeline, run_rows
from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.core.errors import UserError
from nanovllm_cli.options import GenerateOptions
from nanovllm_cli.row_ranges import from_ranges, to_ranges
from nanovllm_cli.shard import Shard
from nanovllm_cli.tokenizer import PromptTokenizer

from .cli import MODEL, SAMPLE, Run, call, generate, read_rows, write_rows
from .fake_engine import FakeEngine, loader


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer() -> Iterator[None]:
    """Loaded once: it takes longer than a job with the fake engine."""
    tokenizer = PromptTokenizer(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_rows, "load_tokenizer", lambda options, model: tokenizer)
        yield


def rows_of(count: int) -> list[dict[str, Any]]:
    """Rows of which some are bad, and one has the id of an earlier one in another shard."""
    rows: list[dict[str, Any]] = [{"id": n, "prompt": f"row {n}"} for n in range(count)]
    for n in range(3, count, 7):
        del rows[n]["prompt"]
    if count > 20:
        rows[20]["id"] = 1
    return rows


def run(source: Path, output: Path, shard: str = "1/1", **more: Any) -> int:
    options = GenerateOptions(
        inputs=[str(source)],
        output=str(output),
        model=str(MODEL),
        engine=EngineConfig(device="cpu", max_num_seqs=8),
        shard=Shard.parse(shard),
        quiet=True,
        **more,
    )
    load: Any = loader(FakeEngine(order_seed=sum(map(ord, shard))))
    return int(pipeline.generate(options, load))


def run_shards(source: Path, folder: Path, count: int, suffix: str = ".jsonl") -> list[Path]:
    paths = [folder / f"shard-{n}{suffix}" for n in range(1, count + 1)]
    for n, path in enumerate(paths, 1):
        assert run(source, path, f"{n}/{count}") in (0, 3)
    return paths


def merge(*arguments: str | Path) -> Run:
    return call("merge", *arguments)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize(("num_rows", "count"), [(100, 4), (100, 7), (3, 5), (1, 1), (0, 2)])
def test_merged_shards_are_the_bytes_of_one_run(
    num_rows: int, count: int, suffix: str, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "in.jsonl", rows_of(num_rows))
    code = run(source, tmp_path / f"whole{suffix}")
    paths = run_shards(source, tmp_path, count, suffix)
    merged = tmp_path / f"merged{suffix}"
    ended = merge(*reversed(paths), "-o", merged)
    assert (ended.code, ended.stdout) == (code, b""), ended
    assert merged.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    for what in ("errors.jsonl",):
        ours, theirs = tmp_path / f"merged{suffix}.{what}", tmp_path / f"whole{suffix}.{what}"
        assert ours.exists() == theirs.exists()
        assert not ours.exists() or ours.read_bytes() == theirs.read_bytes()
    stats = json.loads((tmp_path / f"merged{suffix}.stats.json").read_bytes())
    whole = json.loads((tmp_path / f"whole{suffix}.stats.json").read_bytes())
    for name in ("done", "completed", "failed", "failed_by_code", "finish_reasons"):
        assert stats["rows"][name] == whole["rows"][name], name
    assert stats["fingerprint"] == whole["fingerprint"]
    assert len(stats["shards"]) == count


def test_shards_of_parquet_rows_become_the_parquet_file_of_one_run(tmp_path: Path) -> None:
    source = tmp_path / "in.parquet"
    numbers = pa.array(range(40), pa.uint8())
    table = pa.table(
        {"prompt": [f"p{n}" for n in range(40)], "number": numbers, "b": [b"\xff"] * 40}
    )
    pq.write_table(table, source)
    run(source, tmp_path / "whole.parquet")
    paths = run_shards(source, tmp_path, 3)
    assert merge(*paths, "-o", tmp_path / "merged.parquet").code == 0
    merged, whole = tmp_path / "merged.parquet", tmp_path / "whole.parquet"
    assert merged.read_bytes() == whole.read_bytes()
    assert pq.read_table(merged).column("number").type == pa.uint8()
    pq.write_table(table.set_column(1, "number", pa.array(range(1, 41), pa.uint8())), source)
    ended = merge(*paths, "-o", merged, "--overwrite")
    assert ended.code == 78
    assert "has changed since" in ended.stderr


def test_real_shards_with_the_real_command(tmp_path: Path) -> None:
    arguments = (SAMPLE / "prompts.jsonl", "--max-tokens", "3", "--limit", "30", "--quiet")
    for shard in ("1/2", "2/2"):
        output = tmp_path / f"out-{shard[0]}.jsonl"
        assert generate(*arguments, "-o", output, "--shard", shard, "--temperature", "1").code == 0
    assert generate(*arguments, "-o", tmp_path / "whole.jsonl", "--temperature", "1").code == 0
    ended = merge(tmp_path / "out-1.jsonl", tmp_path / "out-2.jsonl", "-o", tmp_path / "m.jsonl")
    assert ended.code == 0
    assert "30 rows of 2 shards, 0 failed" in ended.stderr
    assert (tmp_path / "m.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.lock"))


def test_a_shard_on_stdout_has_its_rows_in_order(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"id": n, "prompt": "a"} for n in range(10)])
    ended = generate(source, "--max-tokens", "1", "--quiet", "--shard", "2/3")
    assert [row["id"] for row in ended.rows] == [1, 4, 7]


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Three shards of one job."""
    return run_shards(write_rows(tmp_path / "in.jsonl", rows_of(50)), tmp_path, 3)


def test_the_errors_that_a_pattern_finds_besides_are_no_shards(
    shards: list[Path], tmp_path: Path
) -> None:
    found = sorted(tmp_path.glob("shard-*.jsonl"))
    assert len(found) > 3
    assert merge(*found, "-o", tmp_path / "merged.jsonl").code == 3


def test_missing_shards_are_named(shards: list[Path], tmp_path: Path) -> None:
    ended = merge(shards[1], "-o", tmp_path / "merged.jsonl")
    assert ended.code == 65
    assert "2 of 3 shards are missing: 1/3, 3/3" in ended.stderr
    assert not (tmp_path / "merged.jsonl").exists()
    ended = merge(*shards, tmp_path / "shard-4.jsonl", "-o", tmp_path / "merged.jsonl")
    assert ended.code == 66
    assert "shard-4.jsonl" in ended.stderr


def test_a_shard_that_is_not_finished_is_refused(shards: list[Path], tmp_path: Path) -> None:
    (tmp_path / "shard-2.jsonl.stats.json").unlink()
    ended = merge(*shards, "-o", tmp_path / "merged.jsonl")
    assert ended.code == 65
    assert "shard-2.jsonl.stats.json is not there" in ended.stderr


@pytest.mark.parametrize("what", ["shard-3.jsonl", "shard-3.jsonl.errors.jsonl"])
def test_a_shard_that_was_touched_is_refused(what: str, shards: list[Path], tmp_path: Path) -> None:
    with open(tmp_path / what, "ab") as file:
        file.write(b"{}\n")
    ended = merge(*shards, "-o", tmp_path / "merged.jsonl")
    assert ended.code == 65
    assert f"{what} is not" in ended.stderr
    (tmp_path / what).unlink()
    assert merge(*shards, "-o", tmp_path / "merged.jsonl").code in (65, 66)
    assert not (tmp_path / "merged.jsonl").exists()


def test_shards_of_other_settings_are_named(shards: list[Path], tmp_path: Path) -> None:
    run(tmp_path / "in.jsonl", shards[2], "3/3", seed=7, restart=True)
    ended = merge(*shards, "-o", tmp_path / "merged.jsonl")
    assert ended.code == 78
    assert "seed: 0 -> 7" in ended.stderr


def test_shards_of_other_counts_and_inputs_are_refused(shards: list[Path], tmp_path: Path) -> None:
    run(tmp_path / "in.jsonl", tmp_path / "other.jsonl", "1/2")
    ended = merge(*shards[:2], tmp_path / "other.jsonl", "-o", tmp_path / "merged.jsonl")
    assert ended.code == 65
    assert "is shard 1/3, " in ended.stderr
    run(tmp_path / "in.jsonl", tmp_path / "short.jsonl", "3/3", limit=40)
    ended = merge(*shards[:2], tmp_path / "short.jsonl", "-o", tmp_path / "merged.jsonl")
    assert ended.code == 65
    assert "of an input of 50 rows" in ended.stderr
    changed = write_rows(tmp_path / "changed.jsonl", [*rows_of(49), {"id": 49, "prompt": "x"}])
    run(changed, tmp_path / "changed.out.jsonl", "3/3")
    ended = merge(*shards[:2], tmp_path / "changed.out.jsonl", "-o", tmp_path / "merged.jsonl")
    assert ended.code == 65
    assert "are of inputs with other rows" in ended.stderr
    run(tmp_path / "in.jsonl", tmp_path / "twice.jsonl", "3/3")
    ended = merge(*shards, tmp_path / "twice.jsonl", "-o", tmp_path / "merged.jsonl")
    assert ended.code == 65
    assert "are both shard 3/3" in ended.stderr


def test_two_shards_do_not_share_an_output(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shard: 1/3 -> 2/3"):
        run(tmp_path / "in.jsonl", shards[0], "2/3")


def test_what_is_not_ours_is_not_replaced_by_a_merge(shards: list[Path], tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_text("precious")
    assert merge(*shards, "-o", tmp_path / "old.jsonl").code == 73
    assert (tmp_path / "old.jsonl").read_text() == "precious"
    assert merge(*shards, "-o", "/dev/null", "--overwrite").code == 2
    assert merge(*shards, "-o", "-").code == 2
    ended = merge(*shards, "-o", tmp_path / "old.jsonl", "--overwrite", "--allow-errors")
    assert ended.code == 0
    assert (
        len(read_rows(tmp_path / "old.jsonl")) + len(read_rows(tmp_path / "old.jsonl.errors.jsonl"))
        == 50
    )


@pytest.mark.parametrize(
    "text", ["", "1", "0/2", "3/2", "1/0", "a/b", "-1/2", "1/2/3", " 1/2", "1/"]
)
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--shard is"):
        Shard.parse(text)


@given(num_rows=st.integers(0, 200), count=st.integers(1, 50))
def test_every_row_is_in_one_shard(num_rows: int, count: int) -> None:
    shards = [Shard.parse(f"{n}/{count}") for n in range(1, count + 1)]
    assert sum(shard.size(num_rows) for shard in shards) == num_rows
    for row in range(num_rows):
        assert sum(shard.has(row) for shard in shards) == 1


@given(st.sets(st.integers(0, 300)))
def test_row_numbers_survive_as_ranges(rows: set[int]) -> None:
    numbers = from_ranges(",".join(map(str, sorted(rows))))
    assert numbers.tolist() == sorted(rows)
    assert from_ranges(to_ranges(numbers)).tolist() == sorted(rows)


def test_ranges_are_short() -> None:
    assert to_ranges(from_ranges("0,1,2,5,7,8")) == "0-2,5,7-8"
    assert to_ranges(from_ranges("")) == ""
