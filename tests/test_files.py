"""Files appear whole, and stay: contents are on the disk before names, names before journals go.

A power loss loses what was not synced, and may keep a rename and lose the content.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from nanovllm_cli import files
from nanovllm_cli.files import appearing

from .job_folder import JobFolder, append, good_rows, mixed_rows


def test_a_file_appears_where_its_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with appearing(path, private=False) as temporary:
        temporary.write(b"new")
        temporary.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def fail_while_writing(path: Path) -> None:
    with appearing(path, private=False) as temporary:
        temporary.write(b"half")
        raise ZeroDivisionError


def test_a_file_does_not_appear_where_its_block_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_while_writing(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


class Disk:
    """Notes what the system was asked for, and in which order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.faults: list[str] = []
        self._synced: dict[str, bytes] = {}  # contents on the disk, by name
        self._unsynced_names: set[str] = set()  # directories with renames not on the disk
        real_fsync, real_replace, real_unlink = os.fsync, os.replace, os.unlink

        def fsync(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if os.path.isdir(path):
                self._unsynced_names.discard(path)
            else:
                self._synced[path] = Path(path).read_bytes()
            real_fsync(descriptor)

        def replace(source: Any, target: Any) -> None:
            if self._synced.get(str(source)) != Path(source).read_bytes():
                self.faults.append(f"{target} may be empty after a power loss")
            self._unsynced_names.add(str(Path(target).parent))
            real_replace(source, target)

        def unlink(path: Any, **more: Any) -> None:
            if str(path).endswith(".partial") and self._unsynced_names:
                self.faults.append("the journal goes before the output is sure to be there")
            real_unlink(path, **more)

        for name, replacement in (
            *(("fsync", fsync), ("fdatasync", fsync)),
            *(("replace", replace), ("unlink", unlink)),
        ):
            patch.setattr(os, name, replacement)


def test_contents_are_on_the_disk_before_names_and_names_before_the_journal_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = JobFolder(tmp_path / "job", mixed_rows(30))
    disk = Disk(monkeypatch)
    folder.run()
    append(folder.input, good_rows(3, 30))
    folder.run()
    assert disk.faults == []


@pytest.mark.parametrize("habit", ["sync_file", "sync_directory"])
def test_a_writer_that_syncs_in_no_order_is_found_out(
    habit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = JobFolder(tmp_path / "job", mixed_rows(30))
    monkeypatch.setattr(files, habit, lambda file: None)
    disk = Disk(monkeypatch)
    folder.run()
    assert disk.faults
