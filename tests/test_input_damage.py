"""Damaged inputs: exit code 65 or the very same rows, never a partial success."""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.inputs import Source
from nanovllm_cli.rows import check_inputs, read_rows

from .input_files import COLUMNS, COMPRESS, LINES, columns_of, parquet, source


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def damaged(content: bytes, ends: set[int], trials: int, seed: int) -> Iterator[bytes]:
    """`content` cut, or with a byte changed; cut at `ends`, it would be a whole file."""
    rng = random.Random(seed)
    for trial in range(trials):
        place = rng.randrange(len(content))
        if trial % 2 and place not in ends:
            yield content[:place]
        else:
            changed = bytearray(content)
            changed[place] ^= rng.randrange(1, 256)
            yield bytes(changed)


def as_text(columns: dict[str, Any]) -> dict[str, Any]:
    """Parquet may lose the mark that bytes are text; the rows are all there, and in view."""
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in columns.items()}


def error_of(sources: list[Source]) -> CommandError | None:
    try:
        check_inputs(sources)
    except CommandError as error:
        return error
    return None


def assert_never_a_partial_success(suffix: str, trials: int) -> None:
    if suffix == ".parquet":
        content, ends = parquet(COLUMNS), set()
    else:
        half = LINES.index(b"\n", len(LINES) // 2) + 1
        first, second = COMPRESS[suffix](LINES[:half]), COMPRESS[suffix](LINES[half:])
        content, ends = first + second, {len(first)}
    num_found = 0
    for content_ in damaged(content, ends, trials, seed=trials):
        sources = source(f"in{suffix}", content_)
        error = error_of(sources)
        if error is None:
            assert [as_text(c) for c in columns_of(list(read_rows(sources)))] == COLUMNS
            continue
        num_found += 1
        assert error.exit_code == ExitCode.INPUT_UNUSABLE
        assert re.search(r"byte \d+|row group \d+ of \d+|footer", error.message), error.message
    assert num_found > trials * (0.5 if suffix == ".parquet" else 0.9)


SUFFIXES = [".gz", ".zst", ".parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damage_is_never_a_partial_success(suffix: str) -> None:
    assert_never_a_partial_success(suffix, 67)


@pytest.mark.long
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damage_is_never_a_partial_success_at_full_size(suffix: str) -> None:
    assert_never_a_partial_success(suffix, 667)
