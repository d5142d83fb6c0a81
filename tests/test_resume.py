"""The same line again: what is done stays, what is missing runs, what has changed is refused."""

import json
import os
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanovllm_cli import file_output
from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.core.request import Request
from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.prompt_options import PromptOptions

from .cli import MODEL, read_rows, write_rows
from .fake_engine import FakeEngine
from .job_folder import JobFolder, Rows, Stopped, StoppingEngine, append, good_rows, mixed_rows

Make = Callable[..., JobFolder]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(rows: Rows, name: str = "out.jsonl", folder: str = "job") -> JobFolder:
        return JobFolder(tmp_path / folder, rows, name)

    return make


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst", "out.parquet"])
def test_a_stopped_job_runs_the_missing_rows_only_and_the_bytes_are_the_same(
    name: str, make: Make
) -> None:
    whole = make(mixed_rows(100), name, "whole")
    assert whole.run() == (3, 80)
    folder = make(mixed_rows(100), name)
    folder.stop_after(4)
    assert not folder.output.exists()
    code, num_run = folder.run(FakeEngine(order_seed=5))
    assert (code, num_run) == (3, 80 - 4 * 8)
    assert folder.output.read_bytes() == whole.output.read_bytes()
    assert read_rows(folder.errors) == [
        {**row, "source": row["source"].replace("whole", "job")} for row in read_rows(whole.errors)
    ]
    assert folder.names == {name, f"{name}.errors.jsonl", f"{name}.stats.json"}
    rows = folder.stats["rows"]
    assert (rows["completed"], rows["failed"], rows["resumed"]) == (80, 20, 32)
    assert rows["failed_by_code"] == {"no_prompt": 20}


def test_a_stopped_batch_of_openais_lines_goes_on(make: Make) -> None:
    rows = [
        {
            **{"custom_id": f"c{n}", "method": "POST", "url": "/v1/completions"},
            "body": {"prompt": "a", "n": 0 if n % 5 == 3 else 1},
        }
        for n in range(40)
    ]
    folder, whole = make(rows), make(rows, folder="whole")
    assert whole.run()[0] == ExitCode.SOME_ROWS_FAILED
    folder.stop_after(2)
    assert folder.run()[0] == ExitCode.SOME_ROWS_FAILED
    assert folder.output.read_bytes() == whole.output.read_bytes()
    errors, expected = (
        [{**row, "source": "in.jsonl"} for row in read_rows(job.errors)] for job in (folder, whole)
    )
    assert errors == expected
    assert folder.stats["rows"]["failed_by_code"] == {"bad_parameters": 8}


def test_rows_are_in_equal_out_however_often_a_job_is_stopped(make: Make) -> None:
    folder = make(mixed_rows(100))
    for _ in range(9):
        folder.stop_after(1)
    assert folder.run() == (3, 80 - 9 * 8)
    done = [row["id"] for row in read_rows(folder.output)]
    failed = [row["id"] for row in read_rows(folder.errors)]
    assert done == [n for n in range(100) if n % 5 != 3]
    assert failed == [n for n in range(100) if n % 5 == 3]


def test_a_finished_job_has_nothing_to_do_before_the_model_loads(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(good_rows(30))
    assert folder.run() == (0, 30)
    before = {path: path.stat().st_mtime_ns for path in folder.path.iterdir()}
    assert folder.done(quiet=False) == 0
    assert "nothing to do: " in capsys.readouterr().err
    assert folder.done(quiet=True) == 0
    assert capsys.readouterr() == ("", "")
    assert {path: path.stat().st_mtime_ns for path in folder.path.iterdir()} == before


def test_a_finished_job_with_failed_rows_is_3_again(make: Make) -> None:
    folder = make(mixed_rows(30))
    assert folder.run()[0] == 3
    assert folder.done() == 3
    assert folder.done(allow_errors=True) == 0


def test_a_job_killed_before_it_could_publish_loads_no_model(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(mixed_rows(30))
    with monkeypatch.context() as patch:
        patch.setattr(file_output, "write_lines", stop)
        with pytest.raises(Stopped):
            folder.run()
    assert folder.names == {"out.jsonl.partial"}
    assert folder.done() == 3
    assert len(read_rows(folder.output)) == 24
    assert folder.names == {"out.jsonl", "out.jsonl.errors.jsonl", "out.jsonl.stats.json"}


def stop(*_: Any) -> None:
    raise Stopped


@pytest.mark.parametrize("is_finished", [False, True])
@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst"])
def test_of_an_input_that_grew_only_the_new_rows_run(
    is_finished: bool, name: str, make: Make
) -> None:
    folder = make(good_rows(64), name)
    if is_finished:
        assert folder.run() == (0, 64)
    else:
        folder.stop_after(3)
    append(folder.input, good_rows(10, 64))
    assert folder.run() == (0, 10 if is_finished else 74 - 24)
    whole = make(good_rows(74), name, "whole")
    whole.run()
    assert folder.output.read_bytes() == whole.output.read_bytes()
    assert folder.done() == 0


def test_an_input_that_grew_by_its_limit_runs_the_new_rows(make: Make) -> None:
    folder = make(good_rows(64))
    assert folder.run(limit=10) == (0, 10)
    assert folder.run(limit=25) == (0, 15)
    assert folder.run() == (0, 39)
    error = folder.refused(limit=10)
    assert error.exit_code == ExitCode.CONFIG_MISMATCH
    assert "the input has 10 rows" in error.message
    assert "64" in error.message


def test_a_finished_parquet_file_says_that_it_cannot_grow(make: Make) -> None:
    folder = make(good_rows(20), "out.parquet")
    folder.run()
    append(folder.input, good_rows(1, 20))
    error = folder.refused()
    assert error.exit_code == ExitCode.CONFIG_MISMATCH
    assert "Parquet" in error.message
    assert folder.run(restart=True) == (0, 21)


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_changed_row_is_named_and_refused(is_finished: bool, make: Make) -> None:
    rows = good_rows(40)
    folder = make(rows)
    if is_finished:
        folder.run()
    else:
        folder.stop_after(4)
    done = read_rows(folder.output)[5] if is_finished else {"id": folder.journalled[0]}
    before = {path: path.read_bytes() for path in folder.path.iterdir() if path != folder.input}
    rows[done["id"]]["prompt"] += "!"
    write_rows(folder.input, rows)
    error = folder.refused()
    assert error.exit_code == ExitCode.CONFIG_MISMATCH
    assert f"in.jsonl:{done['id'] + 1} has changed since {folder.output}" in error.message
    assert "--restart" in (error.hint or "")
    for path, content in before.items():  # a run that opens a journal adds its claim
        assert path.read_bytes().startswith(content)
        assert (path == folder.journal) == (path.read_bytes() != content)
    assert folder.run(restart=True) == (0, 40)
    assert [row["prompt"] for row in read_rows(folder.output)] == [row["prompt"] for row in rows]


def test_of_many_rows_a_changed_one_is_named_with_few_neighbours(make: Make) -> None:
    rows = good_rows(1000)
    folder = make(rows)
    folder.run()
    rows[700]["prompt"] += "!"
    write_rows(folder.input, rows)
    message = folder.refused().message
    assert "a row from" in message
    first, last = (int(part.rpartition(":")[2]) for part in message.split(" has ")[0].split(" to "))
    assert first <= 701 <= last < first + 16


@pytest.mark.parametrize("is_finished", [False, True])
def test_rows_that_are_gone_are_refused(is_finished: bool, make: Make) -> None:
    folder = make(good_rows(40))
    if is_finished:
        folder.run()
    else:
        folder.stop_after(4)
    num_left = 39 if is_finished else max(folder.journalled)
    write_rows(folder.input, good_rows(num_left))
    error = folder.refused()
    assert error.exit_code == ExitCode.CONFIG_MISMATCH
    assert f"the input has {num_left} rows" in error.message


@pytest.mark.parametrize("is_finished", [False, True])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"seed": 5}, "seed: 0 -> 5"),
        ({"n": 2}, "n: 1 -> 2"),
        ({"stop": ("x",)}, 'stop: [] -> ["x"]'),
        ({"sampling": {"temperature": 0.5}}, "temperature: 0.0 -> 0.5"),
        ({"sampling": {"max_tokens": 3}}, "max_tokens: unset -> 3"),
        ({"sampling": {"logprobs": 0}}, "logprobs: unset -> 0"),
        ({"sampling": {"logit_bias": ((5, 1.0),)}}, "logit_bias: unset -> [[5,1.0]]"),
        ({"sampling": {"repetition_penalty": 1.5}}, "repetition_penalty: unset -> 1.5"),
        ({"best_of": 1}, "best_of: unset -> 1"),
        ({"bad_words": ("x",)}, 'bad_words: unset -> ["x"]'),
        ({"truncate_prompt_tokens": 2}, "truncate_prompt_tokens: unset -> 2"),
        ({"thinking_budget": 9}, "thinking_budget: unset -> 9"),
        ({"format": "openai"}, "format: auto -> openai"),
        ({"prompt": PromptOptions(system="Be brief.")}, "system: unset -> Be brief."),
        ({"prompt": PromptOptions(system="x" * 900)}, "system: unset -> 900 characters, xxh3 "),
        ({"engine": EngineConfig(device="cpu", max_model_len=64)}, "max_model_len: 4096 -> 64"),
        ({"engine": EngineConfig(device="cpu", dtype="bfloat16")}, "dtype: float32 -> bfloat16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_settings_are_named_and_refused(
    is_finished: bool, more: dict[str, Any], message: str, make: Make
) -> None:
    folder = make(good_rows(20))
    if is_finished:
        folder.run()
    else:
        folder.stop_after(1)
    error = folder.refused(**more)
    assert error.exit_code == ExitCode.CONFIG_MISMATCH
    assert message in error.message
    assert error.message.count("->") == 1
    assert folder.run(restart=True, **more)[0] == 0
    assert len(read_rows(folder.output)) == 20


def test_what_does_not_change_results_may_differ(make: Make) -> None:
    folder = make(good_rows(40))
    folder.stop_after(2)
    engine = EngineConfig(device="cpu", max_num_seqs=3, block_size=16, num_threads=1)
    more = {"engine": engine, "max_inflight": 5, "allow_errors": True, "max_error_rate": 0.5}
    assert folder.run(**more) == (0, 24)


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"]
)
def test_another_model_under_the_same_name_is_named_and_refused(
    file: str, make: Make, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in MODEL.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    folder = make(good_rows(20))
    folder.stop_after(1, model=str(model))
    content = (model / file).read_bytes()
    if file == "model.safetensors":
        content = content[:-200_000] + bytes(200_000)
    else:
        content = content.rstrip()[:-1] + b" }"
    (model / file).write_bytes(content)
    error = folder.refused(model=str(model))
    assert error.exit_code == ExitCode.CONFIG_MISMATCH
    assert ("weights: " if file.endswith("safetensors") else f"{file}: ") in error.message
    assert error.message.count("->") == 1


def test_failed_rows_run_again_where_that_is_wished(make: Make) -> None:
    folder = make(good_rows(50))

    def fails(request: Request) -> bool:
        return (request.request_id >> 10) % 5 == 1

    assert folder.run(FakeEngine(fails=fails)) == (3, 50)
    assert len(read_rows(folder.errors)) == 10
    assert folder.done() == 3
    assert folder.run(retry_failed=True) == (0, 10)
    assert [row["id"] for row in read_rows(folder.output)] == [*range(50)]
    assert not folder.errors.exists()
    whole = make(good_rows(50), folder="whole")
    whole.run()
    assert folder.output.read_bytes() == whole.output.read_bytes()
    assert folder.done(retry_failed=True) == 0


def test_failed_rows_of_a_stopped_job_run_again_too(make: Make) -> None:
    folder = make(good_rows(50))
    with pytest.raises(Stopped):
        folder.run(StoppingEngine(3, fails=lambda request: True))
    assert folder.run(retry_failed=True) == (0, 50)
    assert not folder.errors.exists()


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_failed_row_may_be_mended_and_run_again(is_finished: bool, make: Make) -> None:
    rows = mixed_rows(40)
    folder = make(rows)
    if is_finished:
        assert folder.run() == (3, 32)
    else:
        folder.stop_after(3)
    write_rows(folder.input, good_rows(40))
    if is_finished:
        error = folder.refused()
        assert "a row that failed has changed" in error.message
        assert "--retry-failed" in (error.hint or "")
    assert folder.run(retry_failed=True) == (0, 8 if is_finished else 40 - 24)
    assert [row["id"] for row in read_rows(folder.output)] == [*range(40)]


def test_too_many_errors_stop_a_job_and_leave_it_resumable(make: Make) -> None:
    rows = good_rows(100) + [{"id": n} for n in range(100, 300)] + good_rows(100, 300)
    folder = make(rows)
    with pytest.raises(CommandError, match="a larger share than --max-error-rate") as error:
        folder.run(max_error_rate=0.25)
    assert error.value.exit_code == ExitCode.SOME_ROWS_FAILED
    assert folder.names == {"out.jsonl.partial"}
    done = folder.journalled
    assert 100 <= len(done) <= 300
    assert folder.run() == (3, 200 - sum(row < 100 for row in done))


def test_an_error_rate_below_the_limit_stops_nothing(make: Make) -> None:
    assert make(mixed_rows(300)).run(max_error_rate=0.21)[0] == 3


def test_fewer_than_100_rows_have_no_error_rate(make: Make) -> None:
    assert make(mixed_rows(90)).run(max_error_rate=0.0)[0] == 3


def test_a_name_that_is_no_unicode_does_not_spoil_the_end(make: Make) -> None:
    folder = make(good_rows(5))
    name = os.fsdecode(bytes(folder.path) + b"/\xff.jsonl")
    os.rename(folder.input, name)
    assert folder.run(inputs=[name]) == (0, 5)
    assert folder.done(inputs=[name]) == 0
    assert "dcff" in folder.stats["inputs"][0]


# --- what is ours and what is not


def test_an_output_that_was_touched_by_others_is_not_ours(make: Make) -> None:
    folder = make(good_rows(20))
    folder.run()
    append(folder.output, [{"mine": 1}])
    error = folder.refused()
    assert error.exit_code == ExitCode.OUTPUT_EXISTS
    assert folder.refused(restart=True).exit_code == ExitCode.OUTPUT_EXISTS
    assert read_rows(folder.output)[-1] == {"mine": 1}
    assert folder.run(overwrite=True) == (0, 20)
    assert folder.run(overwrite=True) == (0, 20)  # all of it, each time


def test_an_errors_file_of_a_flag_that_is_not_ours_is_refused(make: Make) -> None:
    folder = make(mixed_rows(20))
    errors = folder.path / "bad.jsonl"
    errors.write_text("precious\n")
    assert folder.refused(errors=str(errors)).exit_code == ExitCode.OUTPUT_EXISTS
    errors.unlink()
    assert folder.run(errors=str(errors))[0] == 3
    assert folder.done(errors=str(errors)) == 3
    folder.stop_after(1, errors=str(errors), restart=True)
    assert folder.refused(errors=str(folder.input)).exit_code == ExitCode.OUTPUT_EXISTS


def test_errors_to_stderr_make_no_file(
    make: Make, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = make(mixed_rows(20))
    assert folder.run(errors="-")[0] == 3
    assert folder.names == {"out.jsonl", "out.jsonl.stats.json"}
    lines = capfd.readouterr().err.splitlines()
    assert [json.loads(line)["id"] for line in lines] == [3, 8, 13, 18]
    assert not (tmp_path / "-").exists()


def test_a_file_that_is_no_journal_is_not_replaced(make: Make) -> None:
    folder = make(good_rows(5))
    folder.journal.write_text("precious\n")
    assert folder.refused().exit_code == ExitCode.OUTPUT_EXISTS
    assert folder.journal.read_text() == "precious\n"
    assert folder.run(restart=True) == (0, 5)


def test_stats_that_make_no_sense_make_the_output_not_ours(make: Make) -> None:
    folder = make(good_rows(20))
    folder.run()
    stats = folder.path / "out.jsonl.stats.json"
    whole = folder.stats
    broken = [b"", b"[]", b"{", orjson.dumps({**whole, "resume": None})]
    broken.append(orjson.dumps({**whole, "rows": {"completed": 21_000}}))
    for content in broken:
        stats.write_bytes(content)
        assert folder.refused().exit_code == ExitCode.OUTPUT_EXISTS
    stats.unlink()
    assert folder.refused().exit_code == ExitCode.OUTPUT_EXISTS


def test_private_files_are_for_their_owner_alone(make: Make) -> None:
    folder = make(mixed_rows(20))
    assert folder.run(private=True)[0] == 3
    modes = {path.stat().st_mode & 0o777 for path in folder.path.iterdir() if path != folder.input}
    assert modes == {0o600}


def test_a_stream_goes_on_in_a_journal_and_a_changed_one_is_refused(
    make: Make, tmp_path: Path
) -> None:
    folder = make(good_rows(60))
    folder.stop_after(2)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def feed(source: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sh", "-c", f"cat '{source}' > '{fifo}'"])

    first = folder.journalled[0]
    rows = good_rows(60)
    rows[first]["prompt"] = "another"
    changed = feed(write_rows(tmp_path / "changed.jsonl", rows))
    with pytest.raises(CommandError, match=f":{first + 1} has changed"):
        folder.run(inputs=[str(fifo)])
    changed.wait()
    unchanged = feed(folder.input)
    assert folder.run(inputs=[str(fifo)])[0] == 0
    unchanged.wait()
    assert [row["id"] for row in read_rows(folder.output)] == [*range(60)]
    again = feed(folder.input)
    assert folder.refused(inputs=[str(fifo)]).exit_code == ExitCode.OUTPUT_EXISTS
    again.wait()


def test_rows_of_parquet_are_known_again(make: Make) -> None:
    folder = make([])
    source = folder.path / "in.parquet"
    table = pa.table({"prompt": [f"row {n}" for n in range(60)], "x": [n / 7 for n in range(60)]})
    pq.write_table(table, source)
    folder.stop_after(3, inputs=[str(source)])
    changed = table.set_column(1, "x", pa.array([n / 7 + 1e-9 for n in range(60)]))
    pq.write_table(changed, source)
    assert "in.parquet:" in folder.refused(inputs=[str(source)]).message
    pq.write_table(table, source, row_group_size=7)  # the same rows in another file
    assert folder.run(inputs=[str(source)]) == (0, 60 - 24)


def test_rows_that_are_not_done_take_no_memory_when_a_job_is_resumed(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(good_rows(60_000))
    folder.stop_after(1)
    peaks = []
    resume = file_output.FileOutput.resume

    def measured(output: Any, num_rows: int | None) -> bool:
        tracemalloc.start()
        try:
            return resume(output, num_rows)
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    monkeypatch.setattr(file_output.FileOutput, "resume", measured)
    folder.stop_after(1)
    assert (
        peaks[0] < 7_000_000
    )  # what is read at a time; an object for each row would be twice that


def test_a_duplicate_of_a_row_that_is_done_is_still_one(make: Make) -> None:
    rows = good_rows(64)
    rows[60]["id"] = 0
    folder = make(rows)
    folder.stop_after(3)
    assert folder.run()[0] == 3
    (error,) = read_rows(folder.errors)
    assert (error["line"], error["error"]["code"]) == (61, "duplicate_id")
