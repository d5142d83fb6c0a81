"""Endings that a machine with too little of something brings about: a code of the table, always."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pytest

from nanovllm_cli.core.errors import UserError
from nanovllm_cli.run_job import exit_code_of
from nanovllm_cli.shard import Shard

from .cli import COMMAND, MODEL, Run, environment, write_rows

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
MODEL_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    "model.safetensors",
)
LINE = f"exec nanovllm generate in.jsonl -o out.jsonl --model {MODEL} --max-tokens 2 --quiet"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "in.jsonl", [{"prompt": f"Q: {n}+1=\nA:"} for n in range(4)])
    return tmp_path


def shell(folder: Path, line: str, before: Callable[[], object] | None = None, **more: str) -> Run:
    ended = subprocess.run(
        ["/bin/sh", "-c", line],
        cwd=folder,
        env=environment(HF_HUB_OFFLINE="1", **more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        preexec_fn=before,
        timeout=120,
    )
    return Run(
        code=ended.returncode,
        stdout=ended.stdout,
        stderr=ended.stderr.decode(errors="backslashreplace"),
    )


def as_stranger(folder: Path, line: str, *, nproc: int | None = None) -> Run:
    """Run a line as a user without a name, a home and other processes.

    Where Python is installed in a home that others cannot enter, they see another there.
    """
    user = 60_000 + os.getpid() % 5000
    for path in (folder, *folder.parents):
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(path.stat().st_mode | (0o7 if path == folder else 0o5))
    python = Path(sys.executable).resolve()
    homes = [path for path in python.parents if not path.stat().st_mode & 0o1]
    mounts = ""
    if homes:
        kept = python.parents[1]
        mounts = (
            f"mkdir -p kept && mount --bind {kept} kept && "
            f"mount -t tmpfs -o mode=755 none {homes[0]} && "
            f"mkdir -p {kept} && mount --bind kept {kept} && "
        )
    few = "" if nproc is None else f"prlimit --nproc={nproc}:{nproc} "
    (folder / "line.sh").write_text(f"unset HOME; {line}")
    become = f"setpriv --reuid {user} --regid {user} --clear-groups"
    whole = f"{mounts}exec {become} {few}sh line.sh"
    return shell(folder, f"exec unshare --mount sh -c '{whole}'")


WATCH = """
import json, os, sys
from nanovllm_cli import app, pipeline
real = pipeline._exit_code
def watched(*arguments):
    names = {}
    for number in (0, 1, 2):
        try:
            names[number] = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            names[number] = "closed"
    with open("seen.json", "w") as file:
        json.dump(names, file)
    return real(*arguments)
pipeline._exit_code = watched
sys.argv = ["nanovllm", *sys.argv[1:]]
app.main()
"""


CLOSED = [closed for closed in product((0, 1), repeat=3) if any(closed)]
PUSHED = ((1, 0, 0), (1, 1, 1))


def some(values: list[object], pushed: tuple[object, ...]) -> list[object]:
    """All values, those that are not tried on every push marked so."""
    return [v if v in pushed else pytest.param(v, marks=pytest.mark.long) for v in values]


@pytest.mark.parametrize("closed", some([*CLOSED], PUSHED))
def test_no_file_of_a_job_takes_the_place_of_a_closed_stream(
    closed: tuple[int, ...], folder: Path
) -> None:
    signs = ("<&-", ">&-", "2>&-")
    shut = " ".join(sign for sign, is_closed in zip(signs, closed, strict=True) if is_closed)
    (folder / "watch.py").write_text(WATCH)
    flags = f"--model {MODEL} --max-tokens 1 --single-process"
    ended = shell(
        folder, f"exec {sys.executable} watch.py generate in.jsonl -o out.jsonl {flags} {shut}"
    )
    assert ended.code == 0, ended
    names = json.loads((folder / "seen.json").read_text())
    assert not any("out.jsonl" in name for name in names.values())
    for number, is_closed in enumerate(closed):
        assert (names[str(number)] == os.devnull) == bool(is_closed or number == 0)


def test_a_stdin_that_is_closed_is_no_input_and_a_stdout_no_output(folder: Path) -> None:
    line = f"exec nanovllm generate {{}} --model {MODEL}"
    assert shell(folder, line.format("- -o out.jsonl <&-")).code == 66
    assert shell(folder, line.format("in.jsonl >&-")).code == 141


@needs_root
def test_a_user_without_a_name_and_a_home_runs_a_job(folder: Path) -> None:
    ended = as_stranger(folder, LINE)
    assert ended.code == 0, ended
    unknown = LINE.replace(str(MODEL), '"~/no/model"').replace("-o out.jsonl", "-o new.jsonl")
    ended = as_stranger(folder, unknown)
    assert ended.code == 66, ended


@needs_root
@pytest.mark.parametrize("name", some([*MODEL_FILES], ("tokenizer.json",)))
def test_a_models_file_that_this_user_cannot_read_is_66_with_its_path(
    name: str, folder: Path
) -> None:
    model = folder / "model"
    shutil.copytree(MODEL, model)
    (model / name).chmod(0)
    ended = as_stranger(folder, LINE.replace(str(MODEL), "model"))
    assert ended.code in (65, 66), ended
    assert f"model/{name}" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "internal error" not in ended.stderr


@needs_root
def test_a_journal_of_another_user_is_73(folder: Path) -> None:
    (folder / "out.jsonl.partial").write_text("x")
    (folder / "out.jsonl.partial").chmod(0o600)
    ended = as_stranger(folder, LINE)
    assert ended.code == 73, ended
    assert "out.jsonl.partial is a file of another user" in ended.stderr


LITTLE: dict[str, Callable[[], object]] = {
    "8 descriptors": partial(resource.setrlimit, resource.RLIMIT_NOFILE, (8, 8)),
    "12 descriptors": partial(resource.setrlimit, resource.RLIMIT_NOFILE, (12, 12)),
    "300 MB": partial(resource.setrlimit, resource.RLIMIT_AS, (300 << 20, 300 << 20)),
    "600 MB": partial(resource.setrlimit, resource.RLIMIT_AS, (600 << 20, 600 << 20)),
}


@pytest.mark.parametrize("what", some([*LITTLE], ("8 descriptors", "300 MB")))
def test_too_little_of_something_is_69_and_the_job_can_go_on(what: str, folder: Path) -> None:
    ended = shell(folder, LINE, LITTLE[what])
    assert ended.code in (0, 69), ended
    if ended.code:
        assert "error: " in ended.stderr
        assert "internal error" not in ended.stderr
        assert "hint: " in ended.stderr
    assert shell(folder, LINE).code == 0


@needs_root
@pytest.mark.parametrize("number", some([2, 3, 5, 8], (2,)))
def test_too_few_processes_are_69_and_no_hang(number: int, folder: Path) -> None:
    ended = as_stranger(folder, LINE, nproc=number)
    assert ended.code in (0, 69), ended
    if ended.code:
        assert "internal error" not in ended.stderr
        assert "hint: " in ended.stderr


@needs_root
@pytest.mark.long
def test_process_1_ends_by_an_interrupt(folder: Path) -> None:
    """As in a container: the kernel sends it no signal that it does not handle."""
    write_rows(folder / "in.jsonl", [{"prompt": f"Q: {n}+1=\nA:"} for n in range(3000)])
    arguments = ["generate", "in.jsonl", "-o", "out.jsonl", "--model", MODEL, "--max-tokens", "64"]
    process = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", COMMAND, *arguments],
        cwd=folder,
        env=environment(HF_HUB_OFFLINE="1"),
        stderr=subprocess.DEVNULL,
    )
    journal = folder / "out.jsonl.partial"
    give_up = time.monotonic() + 60
    while not journal.exists() and time.monotonic() < give_up:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGINT)
    assert process.wait(60) == 130


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), 69),
        (OSError(28, "No space left on device"), 74),
        (OSError(5, "Input/output error"), 74),
        (OSError(122, "Disk quota exceeded"), 74),
        (OSError(24, "Too many open files"), 69),
        (OSError(12, "Cannot allocate memory"), 69),
        (BlockingIOError(11, "Resource temporarily unavailable"), 69),
        (PermissionError(13, "Permission denied", "f"), 66),
        (RuntimeError("can't start new thread"), 69),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), 69),
        (RuntimeError("boom"), 1),
        (ImportError("no module"), 1),
        (OSError("of our own"), 1),
    ],
    ids=repr,
)
def test_what_the_system_refuses_has_its_code(error: BaseException, code: int) -> None:
    assert exit_code_of(error) == code


@pytest.mark.parametrize("text", ["9" * 22 + "/" + "9" * 22, "1/9999999999", "0/1", "2/1", "1/"])
def test_a_shard_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="must be i/N"):
        Shard.parse(text)
