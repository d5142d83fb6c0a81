"""Files planted where a job's own will be, and files of earlier runs: nothing foreign is touched.

Shared folders hold links, FIFOs and files of other users; whatever name they were given, a job
refuses them at once and changes nothing, or does not meet them at all.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.files import hold, new_name, open_own
from nanovllm_cli.lock import output_lock
from nanovllm_cli.output_paths import OutputPaths, check_distinct, check_publishable

from .cli import MODEL, ROOT, environment, generate, run, write_rows
from .fake_engine import FakeEngine
from .job_folder import JobFolder, good_rows, mixed_rows

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files of other users")


def _other_users(path: Path) -> None:
    path.write_text("{}")
    os.chown(path, NOBODY, NOBODY)


# What may be planted at a name, with a word of the message. `victim` lies beside it.
PLANTED: dict[str, Callable[[Path], object]] = {
    "symbolic link to": lambda path: path.symlink_to("victim"),
    "symbolic link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a FIFO": lambda path: os.mkfifo(path),
    "a directory": lambda path: path.mkdir(),
    "2 hard links": lambda path: path.hardlink_to(path.with_name("victim")),
}
FOREIGN = [*PLANTED, pytest.param("another user", marks=needs_root)]


def plant(what: str, path: Path) -> None:
    (path.parent / "victim").write_text("precious")
    PLANTED.get(what, _other_users)(path)


def seen(folder: Path) -> dict[str, object]:
    """What is in a folder, to be compared."""
    return {
        path.name: (
            path.lstat().st_mode,
            path.lstat().st_ino,
            path.read_bytes() if path.is_file() else None,
        )
        for path in folder.iterdir()
    }


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("name", ["partial", "stats.json", "errors.jsonl"])
def test_a_foreign_file_in_an_own_ones_place_is_refused_at_once(
    name: str, what: str, tmp_path: Path
) -> None:
    folder = JobFolder(tmp_path / "job", mixed_rows(10))
    plant(what, folder.path / f"out.jsonl.{name}")
    before = seen(folder.path)
    for more in ({}, {"overwrite": True}, {"restart": True}, {"private": True}):
        error = folder.refused(**more)
        assert error.exit_code == ExitCode.OUTPUT_EXISTS
        assert f"out.jsonl.{name} is a" in error.message
        assert what in error.message
        assert seen(folder.path) == before


@pytest.mark.parametrize("name", ["stats.json", "errors.jsonl"])
def test_what_another_program_wrote_beside_the_output_is_replaced_only_by_overwrite(
    name: str, tmp_path: Path
) -> None:
    folder = JobFolder(tmp_path / "job", good_rows(3))
    path = folder.path / f"out.jsonl.{name}"
    path.write_text('{"mine": 1}\n')
    for more in ({}, {"restart": True}, {"retry_failed": True}):
        error = folder.refused(**more)
        assert (error.exit_code, path.name in error.message) == (ExitCode.OUTPUT_EXISTS, True)
        assert path.read_text() == '{"mine": 1}\n'
    assert folder.run(overwrite=True)[0] == 0
    assert folder.names == {"out.jsonl", "out.jsonl.stats.json"}


def test_the_errors_of_a_job_whose_output_was_moved_away_are_kept(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "job", mixed_rows(10))
    assert folder.run()[0] == 3
    folder.output.rename(folder.path / "monday.jsonl")
    failed = folder.errors.read_bytes()
    error = folder.refused()
    assert (error.exit_code, "has been moved" in error.message) == (73, True)
    assert folder.errors.read_bytes() == failed
    folder.errors.rename(folder.path / "monday.jsonl.errors.jsonl")
    assert folder.run()[0] == 3
    assert folder.errors.read_bytes() == failed


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_lock_is_refused_at_once(what: str, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    plant(what, tmp_path / "out.jsonl.lock")
    before = seen(tmp_path)
    ended = generate(source, "-o", tmp_path / "out.jsonl")
    assert ended.code == 73
    assert what in ended.stderr
    assert seen(tmp_path) == before


@needs_root
def test_a_lock_that_another_user_holds_is_75_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "out.lock"
    path.write_text("process 7 of a colleague\n")
    os.chown(path, NOBODY, NOBODY)
    descriptor = os.open(path, os.O_RDONLY)
    assert hold(descriptor)
    with (
        pytest.raises(CommandError, match="process 7 of a colleague") as error,
        output_lock(tmp_path / "out"),
    ):
        raise AssertionError("two have the lock")
    assert error.value.exit_code == ExitCode.LOCKED
    os.close(descriptor)


def test_a_link_under_a_name_that_was_a_temporary_files_is_not_met(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "job", mixed_rows(10))
    (folder.path / "victim").write_text("precious")
    ends = ("", ".partial", ".stats.json", ".errors.jsonl")
    planted = [folder.path / f".out.jsonl{end}.tmp" for end in ends]
    planted.append(folder.path / ".out.jsonl.partial.reopened")
    for path in planted:
        path.symlink_to("victim")
    assert folder.run() == (3, 8)
    assert folder.run(retry_failed=True)[0] == 3  # the journal is made again of the output
    assert (folder.path / "victim").read_text() == "precious"
    assert all(path.is_symlink() for path in planted)


@pytest.mark.parametrize("flag", ["-o", "--errors", "--metrics-file"])
@pytest.mark.parametrize("target", ["victim", "nowhere"])
def test_an_output_that_is_a_link_is_refused_with_its_target(
    target: str, flag: str, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / target)
    before = seen(tmp_path)
    output = () if flag == "-o" else ("-o", tmp_path / "out.jsonl")
    ended = generate(source, *output, flag, tmp_path / "link.jsonl", "--overwrite")
    assert ended.code == 73
    assert str(tmp_path / target) in ended.stderr
    assert seen(tmp_path) == before


def test_what_killed_runs_left_is_removed_and_what_lives_is_not(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    names = [output, *(tmp_path / f"out.jsonl.{end}" for end in ("partial", "stats.json"))]
    left = [new_name(path) for path in names]
    others = [new_name(tmp_path / "other.jsonl"), tmp_path / ".nanovllm-note.tmp"]
    alive = new_name(output)
    for path in (*left, *others, alive):
        path.write_text("half")
    link = new_name(output)
    link.symlink_to("other")
    descriptor = os.open(alive, os.O_RDWR)
    assert hold(descriptor)  # as a run that has lost its lock's name
    with output_lock(output):
        assert not any(path.exists() for path in left)
        assert all(path.exists() for path in (*others, alive))
        assert link.is_symlink()
    os.close(descriptor)
    with output_lock(output):
        assert not alive.exists()


def test_a_private_job_makes_private_what_an_earlier_run_left(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "job", mixed_rows(40))
    folder.stop_after(2)
    assert folder.journal.stat().st_mode & 0o777 == 0o644
    folder.stop_after(1, private=True)
    assert folder.journal.stat().st_mode & 0o777 == 0o600
    assert folder.run(private=True)[0] == 3
    modes = {name: (folder.path / name).stat().st_mode & 0o777 for name in folder.names}
    ends = ("", ".errors.jsonl", ".stats.json")
    assert modes == {f"out.jsonl{end}": 0o600 for end in ends}
    for name in folder.names:
        (folder.path / name).chmod(0o644)
    assert folder.done(private=True) == 3  # nothing to do but this
    modes = {name: (folder.path / name).stat().st_mode & 0o777 for name in folder.names}
    assert modes == {f"out.jsonl{end}": 0o600 for end in ends}
    with output_lock(tmp_path / "x"):
        pass
    (tmp_path / "x.lock").write_text("")
    with output_lock(tmp_path / "x", private=True):
        assert (tmp_path / "x.lock").stat().st_mode & 0o777 == 0o600


def test_a_new_private_file_is_private_before_it_has_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    os.close(open_own(path, os.O_RDWR | os.O_CREAT, private=True))
    assert path.stat().st_mode & 0o777 == 0o600


@needs_root
def test_a_mount_point_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    for name in ("bound", "o ut.jsonl"):
        (tmp_path / name).write_text("")
    line = (
        'mount --bind bound "o ut.jsonl" && exec nanovllm generate in.jsonl -o "o ut.jsonl" '
        f"--overwrite --model {MODEL}"
    )
    ended = subprocess.run(
        ["unshare", "--mount", "/bin/sh", "-c", line],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 73, ended.stderr
    assert "o ut.jsonl is a mount point" in ended.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "bound", "o ut.jsonl"}


@needs_root
def test_a_file_that_its_directory_lets_nobody_replace_is_refused(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o1777)
    (tmp_path / "out.jsonl").write_text("another's")
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from nanovllm_cli.exit_code import CommandError\n"
        "from nanovllm_cli.output_paths import check_publishable\n"
        "os.setuid(1234)\n"
        "check_publishable(Path('new.jsonl'))\n"
        "try:\n"
        "    check_publishable(Path('out.jsonl'))\n"
        "except CommandError as error:\n"
        "    print(int(error.exit_code), error.message)\n"
    )
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_mode & 0o5 != 0o5 and path != Path("/tmp"):
            path.chmod(path.stat().st_mode | 0o5)
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert ended.stdout.startswith("73 out.jsonl belongs to another user"), ended


def test_a_name_may_be_so_long_that_the_files_beside_it_still_have_theirs(tmp_path: Path) -> None:
    longest = 255 - len(".errors.jsonl")
    folder = JobFolder(tmp_path / "job", mixed_rows(40), "n" * (longest - 6) + ".jsonl")
    folder.stop_after(2)
    with output_lock(folder.output):
        assert folder.run()[0] == 3
    assert len(folder.names) == 3
    for length, code in ((longest + 1, 2), (255, 2), (256, 2), (300, 2)):
        name = "n" * (length - 6) + ".jsonl"
        ended = generate(folder.input, "-o", tmp_path / name)
        assert ended.code == code
        assert f"{length} bytes; it may have {longest}" in ended.stderr
    with_errors = OutputPaths.of(str(tmp_path / ("n" * 244)), str(tmp_path / "e"))
    assert with_errors.output is not None
    with pytest.raises(CommandError, match="bytes in all"):
        OutputPaths.of("/".join(["d" * 200] * 30) + "/out.jsonl")
    with pytest.raises(CommandError, match="255 bytes"):
        OutputPaths.of("d" * 256 + "/out.jsonl")
    with pytest.raises(CommandError, match="not a file's name"):
        check_publishable(Path("a\0b"))


def test_names_that_are_not_unicode_work(tmp_path: Path) -> None:
    inputs = tmp_path / os.fsdecode(b"in_\xe9.jsonl")
    write_rows(inputs, [{"prompt": "Q: 1+1=\nA:"}, {"id": "bad"}])
    model = tmp_path / os.fsdecode(b"m_\xe9")
    model.symlink_to(MODEL)
    output = tmp_path / os.fsdecode(b"out_\xe9\n.jsonl")
    errors, metrics = (tmp_path / os.fsdecode(name) for name in (b"er\xe9", b"me\xe9"))
    flags = ("--errors", errors, "--metrics-file", metrics, "--max-tokens", "2")
    ended = run("generate", inputs, "-o", output, "--model", model, *flags)
    assert ended.code == 3, ended.stderr
    assert output.read_bytes().count(b"\n") == 1
    assert errors.read_bytes().count(b"\n") == 1
    assert b"me" in os.fsencode(metrics)
    assert "\\xe9" in metrics.read_text() or "\\\\udce9" in metrics.read_text()
    again = run("generate", inputs, "-o", output, "--model", model, *flags)
    assert again.code == 3
    assert "nothing to do" in again.stderr


SAME = [
    ("-o out.jsonl --errors out.jsonl.partial", "out.jsonl.partial"),
    ("-o out.jsonl --errors out.jsonl.stats.json", "out.jsonl.stats.json"),
    ("-o out.jsonl --errors out.jsonl.lock", "out.jsonl.lock"),
    ("-o out.jsonl --errors ./sub/../out.jsonl", "out.jsonl"),
    ("-o out.jsonl --errors OUT.jsonl", "OUT.jsonl"),
    ("-o out.jsonl --errors link/out.jsonl.stats.json", "out.jsonl.stats.json"),
    ("-o out.jsonl --metrics-file out.jsonl.stats.json", "out.jsonl.stats.json"),
    ("-o out.jsonl --metrics-file in.jsonl", "in.jsonl"),
    ("-o new/out.jsonl --errors link/new/out.jsonl", "out.jsonl"),
    ("-o in.jsonl --overwrite", "in.jsonl"),
    ("-o hard.jsonl --overwrite", "in.jsonl"),
    ("-o link/in.jsonl --overwrite", "in.jsonl"),
    ("-o out.jsonl --errors in.jsonl --overwrite", "in.jsonl"),
    ("--errors in.jsonl --overwrite", "in.jsonl"),
    ("-o t.jsonl --overwrite --template-file t.jsonl", "--template-file"),
    ("-o t.jsonl --overwrite --prefix-file link/t.jsonl", "--prefix-file"),
    ("-o t.jsonl --overwrite --chat-template t.jsonl", "--chat-template"),
    ("--errors t.jsonl --overwrite --template-file t.jsonl", "--template-file"),
    ("-o c.jsonl --overwrite --config c.jsonl", "--config"),
    ("-o s.jsonl --overwrite --json-schema s.jsonl", "--json-schema"),
    ("-o g.jsonl --overwrite --grammar g.jsonl", "--grammar"),
]


@pytest.mark.parametrize(("line", "name"), SAME)
def test_no_file_has_two_uses(
    line: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    (tmp_path / "hard.jsonl").hardlink_to(source)
    (tmp_path / "link").symlink_to(".")
    (tmp_path / "sub").mkdir()
    (tmp_path / "t.jsonl").write_text("{prompt}\n")
    (tmp_path / "c.jsonl").write_text("top-k = 3\n")
    (tmp_path / "s.jsonl").write_text('{"type": "string"}\n')
    (tmp_path / "g.jsonl").write_text('start: "a"\n')
    before = seen(tmp_path)
    ended = generate("in.jsonl", *line.split())
    assert ended.code == 2, ended.stderr
    assert name in ended.stderr
    assert seen(tmp_path) == before


@needs_root
def test_a_mount_of_the_directory_is_no_other_place(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    (tmp_path / "other").mkdir()
    for flags in ("-o other/in.jsonl --overwrite", "-o out.jsonl --errors other/out.jsonl"):
        line = (
            "mount --bind . other && "
            f"exec nanovllm generate in.jsonl {flags} --model {MODEL} --dry-run"
        )
        ended = subprocess.run(
            ["unshare", "--mount", "/bin/sh", "-c", line],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 2, ended.stderr
        assert "also" in ended.stderr


def test_redirected_streams_and_a_models_files_are_files_of_the_job(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    line = "exec nanovllm generate {} --model {}"
    for text in (
        line.format("in.jsonl >> in.jsonl", MODEL),
        line.format("- -o in.jsonl --overwrite < in.jsonl", MODEL),
        line.format("in.jsonl --errors e.jsonl >> e.jsonl", MODEL),
    ):
        ended = subprocess.run(
            ["/bin/sh", "-c", text],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 2, (text, ended.stderr)
    paths = OutputPaths.of(str(tmp_path / "config.json"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CommandError, match="is a file of the model"):
        check_distinct(paths, others=[("a file of the model", tmp_path / "config.json")])


def test_shards_are_inputs_of_a_merge(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    for output in ("a.jsonl", "a.jsonl.stats.json", "a.jsonl.errors.jsonl"):
        arguments = ("merge", tmp_path / "a.jsonl", "-o", tmp_path / output, "--overwrite")
        ended = run(*arguments)
        assert ended.code == 2, (output, ended.stderr)


class MeddlingEngine(FakeEngine):
    """Does something in the middle of a job."""

    def __init__(self, at_step: int, meddle: Callable[[], object]) -> None:
        super().__init__()
        self._steps_left, self._meddle = at_step, meddle

    def step(self) -> list[object]:  # type: ignore[override]
        self._steps_left -= 1
        if self._steps_left == 0:
            self._meddle()
        return super().step()  # type: ignore[return-value]


def _add(folder: JobFolder) -> None:
    with open(folder.journal, "ab") as file:
        file.write(b"x\n")


MEDDLERS: dict[str, Callable[[JobFolder], object]] = {
    "removes the journal": lambda folder: folder.journal.unlink(),
    "adds to the journal": _add,
    "replaces the journal": lambda folder: os.replace(
        folder.path / "in.jsonl.copy", folder.journal
    ),
    "runs the job to its end": lambda folder: folder.run(),
    "runs some of the job": lambda folder: folder.stop_after(1),
    "puts a link there": lambda folder: (folder.journal.unlink(), folder.journal.symlink_to("x")),
}


@pytest.mark.parametrize("who", MEDDLERS)
@pytest.mark.parametrize("at_step", [2, 5])
def test_whoever_lost_its_journal_stops_and_publishes_nothing(
    at_step: int, who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", lambda descriptor, operation: None)  # as some networks' do
    whole = JobFolder(tmp_path / "whole", good_rows(80))
    whole.run()
    folder = JobFolder(tmp_path / "job", good_rows(80))
    (folder.path / "in.jsonl.copy").write_bytes(b"another's")
    found: list[object] = []

    def meddle() -> None:
        MEDDLERS[who](folder)
        found.append(seen(folder.path))

    with pytest.raises(CommandError, match=r"another run has taken over .*out\.jsonl") as error:
        folder.run(MeddlingEngine(at_step, meddle))
    assert error.value.exit_code == ExitCode.LOCKED
    assert found == [seen(folder.path)]  # nothing of the other's was touched
    if not folder.journal.is_symlink() and who != "replaces the journal":
        assert folder.run()[0] == 0
        assert folder.output.read_bytes() == whole.output.read_bytes()


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.errors.jsonl"])
@pytest.mark.parametrize("num_failed", [0, 8])
def test_what_another_program_leaves_there_while_the_job_runs_is_kept(
    num_failed: int, name: str, tmp_path: Path
) -> None:
    rows = mixed_rows(5 * num_failed) if num_failed else good_rows(40)
    once = JobFolder(tmp_path / "once", rows)
    code = once.run()[0]
    folder = JobFolder(tmp_path / "job", rows)
    path = folder.path / name
    with pytest.raises(CommandError, match="has changed while the job ran") as error:
        folder.run(MeddlingEngine(2, lambda: path.write_text("another's")))
    assert error.value.exit_code == ExitCode.OUTPUT_EXISTS
    assert path.read_text() == "another's"
    path.rename(folder.path / "moved")
    assert folder.done() == code  # its rows are in the journal
    assert folder.output.read_bytes() == once.output.read_bytes()
    assert folder.errors.exists() == bool(num_failed)


def test_a_journal_that_another_run_has_open_is_75_though_the_lock_is_gone(
    tmp_path: Path,
) -> None:
    folder = JobFolder(tmp_path / "job", good_rows(40))
    seconds: list[CommandError] = []

    def second() -> None:
        seconds.append(folder.refused())

    assert folder.run(MeddlingEngine(3, second))[0] == 0  # the first goes on
    assert [error.exit_code for error in seconds] == [ExitCode.LOCKED]


def test_a_journal_of_a_version_without_claims_goes_on(tmp_path: Path) -> None:
    whole = JobFolder(tmp_path / "whole", good_rows(40))
    whole.run()
    folder = JobFolder(tmp_path / "job", good_rows(40))
    folder.stop_after(2)
    lines = folder.journal.read_bytes().splitlines(keepends=True)
    records = [line for line in lines if not line.startswith(b"owner ")]
    assert len(records) == len(lines) - 1
    folder.journal.write_bytes(b"".join(records) + b"1f3a torn")
    assert folder.run() == (0, 40 - 16)
    assert folder.output.read_bytes() == whole.output.read_bytes()


def test_a_stopped_engine_is_no_reason_to_lose_the_journal(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "job", good_rows(40))
    for _ in range(3):
        folder.stop_after(1)
    assert folder.run()[0] == 0
