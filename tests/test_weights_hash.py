"""What the fingerprint sees of weights, what it costs, and which names are one model."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from nanovllm_cli import weights_hash
from nanovllm_cli.fingerprint import differences
from nanovllm_cli.weights_hash import cache_file, content_hash, weights_fingerprint, whole_hash

from .cli import MODEL, Run, call, write_rows

WEIGHTS = "model.safetensors"
ROWS = [{"prompt": f"Q: {n}+4=\nA:"} for n in range(4)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the sample model, to be changed."""
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's file, in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weights_hash, "_SETTLED_NS", 0)  # nothing changes while a test looks
    return tmp_path / "cache" / "nanovllm" / "weights.json"


def flip(file: Path, offset: int) -> None:
    """One bit of a file; its size and its time of change stay."""
    times = file.stat()
    with open(file, "r+b") as opened:
        opened.seek(offset)
        value = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([value ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def started(model: Path, tmp_path: Path) -> Callable[..., Run]:
    """A job with one row done, as a kill leaves it; gives what runs it again with another model."""
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    out = tmp_path / "out.jsonl"
    flags = ("--max-tokens", "2", "-q", "-o", out)
    ended = call("generate", source, "--model", model, *flags)
    assert ended.code == 0, ended
    return lambda name, *more: call("generate", source, "--model", name, *flags, *more)


# What is seen


def test_a_change_in_the_middle_of_a_tensor_is_78(model: Path, tmp_path: Path) -> None:
    again = started(model, tmp_path)
    assert again(model).code == 0
    flip(model / WEIGHTS, 417_792)
    ended = again(model)
    assert ended.code == 78, ended
    assert "weights_content" in ended.stderr


def test_any_byte_of_a_small_model_is_seen(model: Path) -> None:
    file = model / WEIGHTS
    seen = {content_hash(model)}
    for offset in range(10_000, file.stat().st_size, 400_001):
        flip(file, offset)
        seen.add(content_hash(model))
    assert len(seen) == 11


def test_of_a_large_model_every_tensors_ends_and_stretches_inside_are_seen(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_hash, "_WHOLE_BYTES", 1 << 20)
    monkeypatch.setattr(weights_hash, "_SAMPLED_BYTES", 1 << 20)
    monkeypatch.setattr(weights_hash, "_PAGE_BYTES", 1 << 10)
    before = content_hash(model)
    assert content_hash(model) == before
    content = bytearray((model / WEIGHTS).read_bytes())
    for tensor in weights_hash.read_header(model / WEIGHTS):
        # A stretch of 8 KiB holds a page: they are some 4 KiB apart.
        third = (tensor.end - tensor.start) // 3 if tensor.end - tensor.start > 30_000 else 0
        starts = [(tensor.start, 1), (tensor.end - 1, 1), (tensor.start + third, 8 << 10)]
        for start, length in starts[: 3 if third else 2]:
            changed = content.copy()
            changed[start : start + length] = bytes(b ^ 1 for b in content[start : start + length])
            (model / WEIGHTS).write_bytes(changed)
            assert content_hash(model) != before, (tensor.name, start, length)
    (model / WEIGHTS).write_bytes(content)
    assert content_hash(model) == before


def test_a_sample_reads_no_more_than_its_budget(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_hash, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(weights_hash, "_SAMPLED_BYTES", 1 << 20)
    monkeypatch.setattr(weights_hash, "_PAGE_BYTES", 1 << 10)
    extents: list[tuple[int, int]] = []
    hash_extents = weights_hash._hash_extents

    def noted(descriptor: int, group: list[tuple[int, int]]) -> bytes:
        extents.extend(group)
        return hash_extents(descriptor, group)

    monkeypatch.setattr(weights_hash, "_hash_extents", noted)
    content_hash(model)
    assert len(extents) > 500
    assert sum(num_bytes for _, num_bytes in extents) < 1.2 * (1 << 20)


def test_the_old_hash_is_what_version_0_1_kept() -> None:
    named = weights_fingerprint(MODEL, is_whole=False)
    assert named["weights"] == "ed2a8eb2defcc72f487fdd491b27149c"
    assert named.keys() == {"weights", "weights_content"}


def test_a_job_of_version_0_1_goes_on(model: Path, tmp_path: Path) -> None:
    again = started(model, tmp_path)
    stats = tmp_path / "out.jsonl.stats.json"
    content = json.loads(stats.read_bytes())
    del content["fingerprint"]["weights_content"]
    stats.write_text(json.dumps(content, indent=2))
    assert again(model).code == 0
    flip(model / WEIGHTS, 417_792)
    assert again(model).code == 0  # it did not look there
    with open(model / WEIGHTS, "r+b") as file:
        file.seek(-(5 << 10), os.SEEK_END)
        file.write(bytes(5 << 10))
    flip(model / WEIGHTS, 12_000)
    assert (
        weights_fingerprint(model, is_whole=False)["weights"] != content["fingerprint"]["weights"]
    )
    assert again(model).code == 78


# Names


def test_a_model_by_two_names_is_one_setting(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = started(model, tmp_path)
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    for name in ("model", "./model/", "link", tmp_path / "link", "../" + tmp_path.name + "/model"):
        ended = again(name)
        assert ended.code == 0, ended
    monkeypatch.chdir("/")
    assert again(model).code == 0
    copy = shutil.copytree(model, tmp_path / "copy")
    assert again(copy).code == 0
    flip(copy / WEIGHTS, 500_000)
    ended = again(copy)
    assert ended.code == 78
    assert "weights_content" in ended.stderr


@pytest.mark.parametrize("name", ["config.json", "weights", "weights_content"])
def test_another_model_is_told_with_its_name(name: str) -> None:
    one = {"model": "a", "config.json": "1", "weights": "2", "weights_content": "3"}
    other = {**one, "model": "b"}
    assert differences(one, other) == ""
    changes = differences(one, {**other, name: "9"})
    assert f"{name}: {one[name]} -> 9" in changes


def test_names_count_where_the_files_are_not_known() -> None:
    of_0_1 = {"model": "a", "config.json": "1", "weights": "2"}
    for other in ({**of_0_1, "model": "b"}, {**of_0_1, "model": "b", "weights_content": "3"}):
        assert differences(of_0_1, other) == "model: a -> b"
        assert differences(other, of_0_1) == "model: b -> a"
    assert differences(of_0_1, {**of_0_1, "weights_content": "3"}) == ""
    assert differences({"model": "a"}, {"model": "b"}) == "model: a -> b"


# The whole


def test_the_whole_hash_is_kept_until_the_file_changes(model: Path, cache: Path) -> None:
    first = whole_hash(model)
    assert first.num_bytes == (model / WEIGHTS).stat().st_size
    assert cache.stat().st_mode & 0o777 == 0o600
    assert cache.parent.stat().st_mode & 0o777 == 0o700
    second = whole_hash(model)
    assert (second.digest, second.num_bytes) == (first.digest, 0)
    (model.parent / "link").symlink_to(model)
    assert whole_hash(model.parent / "link").num_bytes == 0
    flip(model / WEIGHTS, 417_792)
    changed = whole_hash(model)
    assert changed.num_bytes > 0
    assert changed.digest != first.digest
    flip(model / WEIGHTS, 417_792)
    assert whole_hash(model).digest == first.digest


def test_the_whole_hash_is_of_every_byte(model: Path, cache: Path) -> None:
    part = xxhash.xxh3_128((model / WEIGHTS).read_bytes()).hexdigest()
    total = xxhash.xxh3_128(WEIGHTS.encode() + b"\0" + part.encode() + b"\0").hexdigest()
    assert whole_hash(model).digest == total


def test_a_file_that_has_just_changed_is_not_kept(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_hash, "_SETTLED_NS", 2_000_000_000)
    os.utime(model / WEIGHTS)
    whole_hash(model)
    assert whole_hash(model).num_bytes > 0


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"a": 1}', b'{"a": [1,2,3,4,5,"x"]}'],
    ids=lambda content: content[:20],
)
def test_a_damaged_cache_is_an_empty_one(content: bytes, model: Path, cache: Path) -> None:
    expected = whole_hash(model).digest
    cache.write_bytes(content)
    assert whole_hash(model).digest == expected
    assert whole_hash(model).num_bytes == 0  # mended


def test_a_cache_that_is_a_link_a_fifo_or_cannot_be_written_does_no_harm(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole_hash(model).digest
    victim = tmp_path / "victim"
    victim.write_text("mine")
    cache.unlink()
    cache.symlink_to(victim)
    assert whole_hash(model).digest == expected
    assert victim.read_text() == "mine"
    cache.unlink()
    os.mkfifo(cache)
    assert whole_hash(model).digest == expected
    for place in ("/proc/nowhere", "/dev/null", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        assert whole_hash(model).digest == expected
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "relative")
    assert cache_file() is None
    assert whole_hash(model).digest == expected


def test_verify_weights_says_what_it_took_and_is_compared(
    model: Path, cache: Path, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    flags = ("generate", source, "--model", model, "--max-tokens", "2", "-o", tmp_path / "o.jsonl")
    ended = call(*flags, "--verify-weights", env={"XDG_CACHE_HOME": str(cache.parent.parent)})
    assert ended.code == 0, ended
    assert "every byte" in ended.stderr
    stats = json.loads((tmp_path / "o.jsonl.stats.json").read_bytes())
    assert stats["fingerprint"]["weights_whole"] == whole_hash(model).digest
    assert call(*flags).code == 0  # without it, and
    stats["fingerprint"]["weights_whole"] = "0" * 32
    (tmp_path / "o.jsonl.stats.json").write_text(json.dumps(stats))
    assert call(*flags).code == 0
    ended = call(*flags, "--verify-weights")
    assert ended.code == 78
    assert "weights_whole" in ended.stderr
