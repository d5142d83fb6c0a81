"""`nanovllm bench`, run as a user runs it: on the sample model, a few sequences at a time."""

import json
from pathlib import Path
from typing import Any

import pytest

from .cli import MODEL, ROOT, SAMPLE, Run, call, run, shell, write_rows

BENCH = ("bench", "--model", MODEL, "--num-threads", "1")
QUICK = (*BENCH, "-w", SAMPLE / "prompts.jsonl", "--limit", "2", "--max-tokens", "2")
RECORDS = ROOT / "tests" / "performance" / "records"
ONCE = (*QUICK, "--repeats", "1")


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench") / "new" / "profile"


@pytest.fixture(scope="module")
def measured(profile: Path) -> Run:
    return call(
        *BENCH, "-w", "short-answers", "--limit", "4", "--repeats", "2", "--profile", profile
    )


@pytest.fixture(scope="module")
def record(measured: Run) -> dict[str, Any]:
    assert measured.code == 0, measured.stderr
    return dict(json.loads(measured.stdout))


def test_the_record_has_the_keys_of_vllm_and_they_agree(record: dict[str, Any]) -> None:
    assert list(record)[:5] == [
        "elapsed_time",
        "num_requests",
        "total_num_tokens",
        "requests_per_second",
        "tokens_per_second",
    ]
    assert (record["num_requests"], record["total_num_tokens"]) == (4, 4 * (128 + 32))
    seconds = record["elapsed_time"]
    assert record["requests_per_second"] == pytest.approx(4 / seconds)
    assert record["tokens_per_second"] == pytest.approx(4 * 160 / seconds)


def test_every_pass_counts_its_tokens_and_none_is_served_from_an_earlier_one(
    record: dict[str, Any],
) -> None:
    assert len(record["runs"]) == 2
    for timed in record["runs"]:
        assert (timed["prompt_tokens"], timed["output_tokens"]) == (512, 128)
        assert (timed["cached_tokens"], timed["decode_steps"]) == (0, 31)
        phases = timed["prefill_seconds"] + timed["decode_seconds"]
        assert 0.5 * timed["elapsed_time"] < phases < timed["elapsed_time"]
    assert record["prefix_hit_rate"] == 0
    assert record["mean_batch"] == 4


def test_min_median_and_max_are_those_of_the_passes(record: dict[str, Any]) -> None:
    times = sorted(timed["elapsed_time"] for timed in record["runs"])
    spread = {"min": times[0], "median": sum(times) / 2, "max": times[1]}
    assert record["over_repeats"]["seconds"] == pytest.approx(spread)
    fastest = record["over_repeats"]["output_tokens_per_second"]["max"]
    assert fastest == pytest.approx(128 / times[0])


def test_the_record_says_what_ran_where_and_how(record: dict[str, Any]) -> None:
    assert record["workload"] == "short-answers"
    assert record["weights"] == "the checkpoint's"
    assert record["command"][1:4] == ["bench", "--model", str(MODEL)]
    assert record["settings"]["block_size"] == 64
    assert record["settings"]["num_threads"] == 1
    assert record["software"]["torch"]
    assert record["date"].endswith("+00:00")
    phases = record["phases_seconds"]
    ready = phases["import"] + phases["check"] + phases["load"] + phases["capture"]
    assert record["engine_ready_seconds"] == pytest.approx(ready)
    assert record["peak_host_bytes"] > 2**20
    assert (record["peak_gpu_bytes"], record["gpu_idle_share"]) == (None, None)


def test_the_bound_is_that_of_the_machine_as_measured(record: dict[str, Any]) -> None:
    bound, machine = record["bound"], record["machine"]
    assert machine["bytes_per_second"] > 1e8
    assert machine["flops_per_second"] > 1e8
    parts = bound["prefill_seconds"] + bound["decode_seconds"]
    assert bound["seconds"] == pytest.approx(parts)
    assert bound["share_reached"] == pytest.approx(bound["seconds"] / record["elapsed_time"])
    assert bound["output_tokens_per_second"] == pytest.approx(128 / bound["seconds"])


def test_people_get_a_table_on_stderr(measured: Run) -> None:
    assert "output tokens per second" in measured.stderr
    assert "bound of this machine" in measured.stderr
    assert "pass 2 of 2" in measured.stderr
    lines = measured.stderr.splitlines()
    told = (
        "loading ",
        "warming up with ",
        "pass 1 of 2 begins: ",
        "pass 1 of 2: ",
        "pass 2 of 2 b",
    )
    places = [next(n for n, line in enumerate(lines) if line.startswith(text)) for text in told]
    assert places == sorted(places)
    assert "USDT" not in measured.stderr  # the profiler's own log


def test_a_profile_has_two_traces_and_a_table_whose_shares_are_whole(
    record: dict[str, Any], profile: Path
) -> None:
    slices = record["profile"]
    counts = {name: (s["prefill_launches"], s["decode_steps"]) for name, s in slices.items()}
    assert counts == {"prefill": (1, 0), "decode": (0, 4)}
    table = (profile / "kernels.txt").read_text()
    for name, part in slices.items():
        assert sum(kernel["share"] for kernel in part["kernels"]) == pytest.approx(1)
        assert any("mm" in kernel["name"] for kernel in part["kernels"])
        assert all(kernel["name"][:97] in table for kernel in part["kernels"])
        trace = json.loads((profile / part["trace"]).read_bytes())
        assert trace["traceEvents"]
        assert f"{name}: " in table


SHORT = ("-w", "short-answers", "--limit", "12", "--repeats", "1")


@pytest.mark.parametrize(("tp", "dp"), [(1, 2), pytest.param(2, 2, marks=pytest.mark.long)])
def test_several_engines_or_ranks_are_measured_beside_one_alone(tp: int, dp: int) -> None:
    ended = call(*BENCH, *SHORT, "--tp", str(tp), "--dp", str(dp))
    assert ended.code == 0, ended.stderr
    record = json.loads(ended.stdout)
    assert (record["tensor_parallel_size"], record["data_parallel_size"]) == (tp, dp)
    (timed,) = record["runs"]
    assert (timed["num_requests"], timed["output_tokens"]) == (12, 12 * 32)
    # Equal sequences are shared out equally, and each engine runs its own side by side.
    assert record["replica_output_tokens"] == [12 * 32 // dp] * dp
    assert (timed["decode_steps"], timed["mean_batch"]) == (31 * dp, 12 / dp)
    assert len(record["replica_busy_share"]) == dp
    assert all(0 < share <= 1 for share in record["replica_busy_share"])
    phases = timed["prefill_seconds"] + timed["decode_seconds"]
    assert 0.2 * timed["elapsed_time"] < phases <= timed["elapsed_time"]
    alone = record["single"]
    assert (alone["run"]["output_tokens"], alone["run"]["decode_steps"]) == (12 * 32, 31)
    assert record["speedup"] == pytest.approx(alone["elapsed_time"] / timed["elapsed_time"])
    assert record["efficiency"] == pytest.approx(record["speedup"] / (tp * dp))
    assert f"times as fast with {tp * dp} (tp {tp}, dp {dp})" in ended.stderr
    if dp > 1:
        assert record["phases_seconds"]["capture"] is None
        assert set(record["not_measured"]) == {"peak_gpu_bytes", "gpu_idle_share", "capture"}
        assert "192 + 192 tokens" in ended.stderr
        assert record["peak_host_bytes"] > 2**20


def test_each_engine_can_have_the_whole_workload_and_the_one_alone_too() -> None:
    ended = call(*BENCH, *SHORT, "--dp", "2", "--weak-scaling")
    assert ended.code == 0, ended.stderr
    record = json.loads(ended.stdout)
    assert record["replica_output_tokens"] == [12 * 32] * 2
    alone = record["single"]
    assert alone["run"]["output_tokens"] == 12 * 32
    rate = record["over_repeats"]["output_tokens_per_second"]["median"]
    assert record["speedup"] == pytest.approx(rate / alone["output_tokens_per_second"])


def test_the_engine_alone_can_be_left_out() -> None:
    ended = call(*BENCH, *SHORT, "--tp", "2", "--no-single")
    assert ended.code == 0, ended.stderr
    record = json.loads(ended.stdout)
    assert (record["single"], record["speedup"], record["efficiency"]) == (None, None, None)
    assert record["not_measured"]["single"] == "left out with --no-single"
    assert "times as fast" not in ended.stderr
    assert record["tensor_parallel_size"] == 2
    assert record["runs"][0]["output_tokens"] == 12 * 32


def test_one_engine_has_nothing_to_be_compared_with(record: dict[str, Any]) -> None:
    assert (record["single"], record["speedup"], record["not_measured"]) == (None, None, {})
    assert record["replica_output_tokens"] == [128]


def test_a_file_of_prompts_keeps_its_shared_beginnings_in_every_pass() -> None:
    ended = call(
        *BENCH, "-w", SAMPLE / "shared_prefix.jsonl", "--limit", "3", "--max-tokens", "2",
        "--repeats", "3",
    )  # fmt: skip
    assert ended.code == 0, ended.stderr
    record = json.loads(ended.stdout)
    cached = [timed["cached_tokens"] for timed in record["runs"]]
    assert cached[0] > 0
    assert cached == [cached[0]] * 3
    assert [timed["output_tokens"] for timed in record["runs"]] == [6, 6, 6]


def test_a_row_has_its_own_lengths(tmp_path: Path) -> None:
    rows = [{"prompt_token_ids": [5, 6, 7], "max_tokens": 3}, {"prompt": "Q: 1", "n": 2}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    ended = call(*BENCH, "-w", file, "--max-tokens", "4", "--repeats", "1")
    (timed,) = json.loads(ended.stdout)["runs"]
    assert (timed["num_requests"], timed["output_tokens"]) == (3, 3 + 4 + 4)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    ended = call(*ONCE)
    assert ended.code == 0, ended.stderr
    return dict(json.loads(ended.stdout))


def doctored(old: dict[str, Any], path: Path, factor: float = 1.0, **changed: Any) -> Path:
    """`old` as if it had been `factor` times as fast."""
    new = json.loads(json.dumps(old)) | changed
    new["over_repeats"]["output_tokens_per_second"]["median"] *= factor
    path.write_text(json.dumps(new))
    return path


def test_slower_than_allowed_ends_with_3_and_still_writes_the_record(
    old: dict[str, Any], tmp_path: Path
) -> None:
    fast = doctored(old, tmp_path / "fast.json", 1e4)
    ended = run(*ONCE, "--compare", fast, "--fail-if-slower", "5")
    assert ended.code == 3, ended.stderr
    compared = json.loads(ended.stdout)["comparison"]
    assert compared["is_too_slow"]
    assert compared["change_percent"] < -99
    assert "too slow" in ended.stderr


def test_faster_or_unlimited_is_no_failure(old: dict[str, Any], tmp_path: Path) -> None:
    slow = doctored(old, tmp_path / "slow.json", 1e-4)
    ended = call(*ONCE, "--compare", slow, "--fail-if-slower", "5")
    assert ended.code == 0, ended.stderr
    assert json.loads(ended.stdout)["comparison"]["change_percent"] > 100
    fast = doctored(old, tmp_path / "fast.json", 1e4)
    ended = call(*ONCE, "--compare", fast)
    assert ended.code == 0, ended.stderr
    assert not json.loads(ended.stdout)["comparison"]["is_too_slow"]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"workload": "nano"}, "workload: nano"),
        ({"model": "Qwen3-8B"}, "model: Qwen3-8B"),
        ({"device": "abacus"}, "device: abacus"),
        ({"dtype": "bfloat16"}, "dtype: bfloat16"),
        ({"total_num_tokens": 7}, "total num tokens: 7"),
    ],
)
def test_a_record_of_something_else_is_refused(
    old: dict[str, Any], tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    ended = call(*ONCE, "--compare", doctored(old, tmp_path / "old.json", **changed))
    assert (ended.code, ended.stdout) == (2, b"")
    assert f"another {named}" in ended.stderr


@pytest.mark.parametrize("record", sorted(RECORDS.glob("*.json")), ids=lambda file: file.stem)
def test_the_records_we_keep_can_be_compared_with(record: Path) -> None:
    other = call(*ONCE, "--compare", record)  # another workload, but that is read from it
    assert (other.code, other.stdout) == (2, b"")
    assert "a record of another" in other.stderr


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    for content in ("", "[]", "{}", '{"over_repeats": {"output_tokens_per_second": 5}}'):
        file.write_text(content)
        ended = call(*ONCE, "--compare", file)
        assert (ended.code, ended.stdout) == (2, b""), content
        assert "no record of nanovllm bench" in ended.stderr
    assert call(*ONCE, "--compare", tmp_path).code == 2
    assert call(*ONCE, "--compare", tmp_path / "none.json").code == 66


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--temperature", "-1"], 2, "--temperature is -1.0; it must be 0 to 100"),
        (["--temperature", "nan"], 2, "--temperature is nan"),
        (["--repeats", "0"], 2, "--repeats is 0; it must be at least 1"),
        (["-w", "nanno"], 2, "Did you mean nano?"),
        (["-w", "xyz"], 2, "There are nano, decode-heavy"),
        (["-w", "xyz.jsonl"], 66, "xyz.jsonl"),
        (["--limit", "0"], 2, "--limit is 0; it must be at least 1"),
        (["--limit", "257"], 2, "--limit is 257; nano has 256 sequences"),
        (["--max-tokens", "3"], 2, "nano has lengths of its own"),
        (["--fail-if-slower", "5"], 2, "Add --compare OLD.json"),
        (["--compare", "x", "--fail-if-slower", "-1"], 2, "--fail-if-slower is -1"),
        (["--compare", "x", "--fail-if-slower", "nan"], 2, "--fail-if-slower is nan"),
        (["--profile", __file__], 2, "is no directory"),
        (["--profile", f"{__file__}/x"], 74, "cannot write"),
        (["--dtype", "int4"], 2, "int4"),
        (["--max-window-steps", "0"], 2, "max_window_steps is 0"),
        (["--max-model-len", "1500"], 2, "at most 1500 fit in all"),
        (["--weak-scaling"], 2, "--weak-scaling is for several engines"),
        (["--dp", "0"], 2, "--data-parallel-size is 0; it must be at least 1"),
        (["--dp", "2", "--max-model-len", "1500"], 2, "at most 1500 fit in all"),
        (["--dp", "2", "--profile", "x"], 2, "with --data-parallel-size 2 each is in one of its"),
        (["--tp", "3"], 2, "tensor_parallel_size is 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_value_is_answered_and_nothing_is_measured(
    arguments: list[str], code: int, message: str
) -> None:
    ended = call(*BENCH, *arguments)
    assert (ended.code, ended.stdout) == (code, b""), ended.stderr
    assert message in ended.stderr


def test_a_file_of_prompts_needs_a_tokenizer_and_good_rows(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"x": 1}])
    ended = call("bench", "-w", file, env={"HF_HOME": str(tmp_path)})
    assert (ended.code, ended.stdout) == (66, b"")
    assert "tokenizer" in ended.stderr
    ended = call(*BENCH, "-w", file)
    assert (ended.code, ended.stdout) == (65, b"")
    assert f"{file}:2: " in ended.stderr
    assert call(*BENCH, "-w", file, "--limit", "1", "--max-tokens", "1").code == 0


def test_a_profile_of_one_window_has_its_steps(tmp_path: Path) -> None:
    ended = call(*QUICK, "--max-window-steps", "32", "--profile", tmp_path)
    assert ended.code == 0, ended.stderr
    slices = json.loads(ended.stdout)["profile"]
    assert (slices["prefill"]["prefill_launches"], slices["prefill"]["decode_steps"]) == (1, 0)
    assert (slices["decode"]["prefill_launches"], slices["decode"]["decode_steps"]) == (0, 1)


def test_prompts_come_from_stdin_too() -> None:
    ended = call(
        *BENCH, "-w", "-", "--max-tokens", "1", "--repeats", "1", stdin=b'{"prompt": "Q: 1"}\n'
    )
    assert json.loads(ended.stdout)["runs"][0]["output_tokens"] == 1


@pytest.mark.gpu
def test_a_gpu_is_measured_with_random_weights(tmp_path: Path) -> None:
    ended = run(
        "bench", "-w", "short-answers", "--limit", "200", "--profile", tmp_path,
        env={"HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert ended.code == 0, ended.stderr
    record = json.loads(ended.stdout)
    assert record["weights"] == "random"
    assert [timed["output_tokens"] for timed in record["runs"]] == [200 * 32] * 3
    assert record["peak_gpu_bytes"] > 1.2e9
    assert 0 < record["bound"]["share_reached"] < 1
    assert 0 <= record["gpu_idle_share"] < 1
    for part in record["profile"].values():
        assert sum(kernel["share"] for kernel in part["kernels"]) == pytest.approx(1)
    assert record["profile"]["decode"]["decode_steps"] == 31
    phases = record["runs"][-1]["prefill_seconds"] + record["runs"][-1]["decode_seconds"]
    assert phases == pytest.approx(record["runs"][-1]["elapsed_time"], rel=0.1)


def test_flags_are_environment_variables_too() -> None:
    assert "--repeats is 0" in call(*BENCH, env={"NANOVLLM_REPEATS": "0"}).stderr
    assert "Did you mean nano?" in call(*BENCH, env={"NANOVLLM_WORKLOAD": "nanno"}).stderr


def test_a_disk_that_is_full_and_a_reader_that_has_left(tmp_path: Path) -> None:
    line = "nanovllm " + " ".join(map(str, ONCE))
    full = shell(f"{line} > /dev/full", cwd=tmp_path)
    assert full.code == 74
    assert "cannot write standard output" in full.stderr
    closed = shell(f"{line} >&-", cwd=tmp_path)
    assert (closed.code, closed.stdout) == (141, b"")
    left = shell(f"mkfifo f; : < f & {line} > f; exit $?", cwd=tmp_path)
    assert left.code == 141
    for ended in (full, closed, left):
        assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("command", ["--help", "bench --help", "doctor"])
def test_help_for_a_reader_that_has_left_ends_as_the_signal_would(
    command: str, tmp_path: Path
) -> None:
    # The reader opens the pipe, so that the writer can, and is gone before a byte is written.
    ended = shell(
        f"mkfifo f; : < f & exec 3> f; wait $!; nanovllm {command} >&3; exit $?", cwd=tmp_path
    )
    assert (ended.code, ended.stderr) == (141, "")
