"""Disks that fail in the middle of any call: the job ends with 74, and runs again to its end."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from .cli import ROOT, environment

NAMES = ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst", "out.parquet"]
KINDS = [*((name, "") for name in NAMES), ("out.jsonl", "merge")]
SAMPLED = [KINDS[0], *KINDS[3:]]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that lets calls fail; a C compiler makes it."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    path = tmp_path_factory.mktemp("shim") / "failing_calls.so"
    source = Path(__file__).with_name("failing_calls.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", path, source, "-ldl"], check=True)
    return path


def run_driver(shim: Path, tmp_path: Path, name: str, kind: str, *sizes: int) -> dict[str, Any]:
    """What io_driver.py finds."""
    rows = [{"id": n, "prompt": f"row {n}"} if n % 7 else {"id": n} for n in range(24)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "job").mkdir()
    arguments = [shim, tmp_path / "in.jsonl", tmp_path / "job" / name, *sizes]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.io_driver", *map(str, arguments), *([kind] if kind else [])],
        env=environment(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", LD_PRELOAD=str(shim)),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def samples(
    shim: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], dict[str, Any]]]:
    """A sample of the calls of each kind of output, tried at once."""
    with ThreadPoolExecutor() as pool:
        tried = pool.map(
            lambda kind: run_driver(shim, tmp_path_factory.mktemp("job"), *kind, 16, 17), SAMPLED
        )
        yield dict(zip(SAMPLED, tried, strict=True))


@pytest.mark.parametrize(("name", "kind"), SAMPLED)
def test_a_call_that_fails_ends_a_job_with_74_and_costs_nothing(
    name: str, kind: str, samples: dict[tuple[str, str], dict[str, Any]]
) -> None:
    found = samples[name, kind]
    assert found["bad"] == []
    assert found["failed"] >= 10
    assert found["codes"]["74"] > found["failed"] // 2


@pytest.mark.long
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_500_calls_that_fail_end_their_jobs_with_74_and_cost_nothing(
    name: str, kind: str, shim: Path, tmp_path: Path
) -> None:
    found = run_driver(shim, tmp_path, name, kind, 500, 1)
    print(found)
    assert found["bad"] == []
    assert found["failed"] >= 500
    assert found["codes"]["74"] > found["failed"] // 2
