"""The fingerprint of a model's weights: three hashes, from cheap to whole.

`weights`: names, sizes, headers and the first 4 KiB of every tensor. It is what version 0.1 kept in
its journals and stats files, so that these still resume.

`weights_content`: of a checkpoint of at most 256 MiB every byte. Of a larger one the headers and
64 MiB: of each tensor its first and its last 32 KiB, and pages spread evenly between them, more in
larger tensors. Training and conversion change all of a tensor and are always seen; so is a tensor
that was replaced. A change of a few bytes inside a large tensor is seen only where a page falls on
it.

`weights_whole`: every byte of every file, with --verify-weights. It is kept in a cache by the
file's identity, size and times, so that it is read once.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import xxhash

from nanovllm_cli.core.checkpoint import read_header, weight_files
from nanovllm_cli.core.model_files import open_file, unreadable

_OLD_SAMPLE_BYTES = 4096
_OLD_MAX_HEADER_BYTES = 100 << 20
_WHOLE_BYTES = 256 << 20
_SAMPLED_BYTES = 64 << 20
_PAGE_BYTES = 32 << 10
_CHUNK_BYTES = 8 << 20
_NUM_THREADS = 8
_MAX_CACHED = 256  # files
_MAX_CACHE_BYTES = 1 << 20
_SETTLED_NS = 2_000_000_000  # a file changed less than so long ago may change again unseen


@dataclass(frozen=True, kw_only=True, slots=True)
class WholeHash:
    """A hash of every byte, and what it took."""

    digest: str
    seconds: float
    num_bytes: int  # that were read; 0: all were in the cache


def weights_fingerprint(
    model: Path, *, is_whole: bool, say: Callable[[str], object] = lambda message: None
) -> dict[str, str]:
    """The hashes of the weights in the directory `model`, by name; raises ModelError.

    is_whole: `weights_whole` too; `say` is told what it took.
    """
    named = {"weights": _old_hash(model), "weights_content": content_hash(model)}
    if is_whole:
        whole = whole_hash(model)
        named["weights_whole"] = whole.digest
        read = f"{whole.num_bytes / 1e9:.1f} GB read" if whole.num_bytes else "known from before"
        say(f"the weights are {whole.digest}: every byte, {read}, in {whole.seconds:.1f} s")
    return named


def content_hash(model: Path) -> str:
    """The hash of all of a small checkpoint, and of a sample of a large one."""
    files = weight_files(model)
    is_small = sum(_size(file) for file in files) <= _WHOLE_BYTES
    budget = _SAMPLED_BYTES // _PAGE_BYTES
    total = xxhash.xxh3_128()
    for file in files:
        total.update(os.fsencode(file.name) + b"\0%d\0" % _size(file))
        if is_small:
            total.update(_hash_file(file))
        else:
            total.update(_hash_sample(file, budget * _size(file) // sum(map(_size, files))))
    return total.hexdigest()


def whole_hash(model: Path) -> WholeHash:
    """The hash of every byte of the weights; files that are in the cache are not read."""
    start = time.perf_counter()
    files = weight_files(model)
    cache = _read_cache()
    num_bytes = 0

    def digest_of(file: Path) -> tuple[str, list[int], str, bool]:
        descriptor = open_file(file)
        try:
            identity = _identity(os.fstat(descriptor))
            name = os.path.realpath(file)
            known = cache.get(name)
            if known is not None and known[:-1] == identity:
                return name, identity, known[-1], True
            digest = _hash_descriptor(file, descriptor).hex()
            is_settled = _identity(os.fstat(descriptor)) == identity
            is_settled &= time.time_ns() - identity[-1] > _SETTLED_NS
            return name, identity if is_settled else [], digest, False
        finally:
            os.close(descriptor)

    total = xxhash.xxh3_128()
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        for file, (name, identity, digest, is_known) in zip(
            files, threads.map(digest_of, files), strict=True
        ):
            total.update(os.fsencode(file.name) + b"\0" + digest.encode() + b"\0")
            num_bytes += 0 if is_known else _size(file)
            if identity:
                cache.pop(name, None)
                cache[name] = [*identity, digest]  # the last used stay longest
    _write_cache(cache)
    return WholeHash(
        digest=total.hexdigest(), seconds=time.perf_counter() - start, num_bytes=num_bytes
    )


def _old_hash(model: Path) -> str:
    total = xxhash.xxh3_128()
    for path in sorted(model.glob("*.safetensors")):
        descriptor = open_file(path)
        try:
            total.update(_old_sample(path, descriptor))
        except OSError as error:
            raise unreadable(path, error) from None
        finally:
            os.close(descriptor)
    return total.hexdigest()


def _old_sample(path: Path, descriptor: int) -> bytes:
    """Name, size, header, and the first 4 KiB of every tensor: bytes that must not change."""
    num_bytes = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    header = os.pread(descriptor, min(length, _OLD_MAX_HEADER_BYTES), 8)
    parts = [os.fsencode(path.name), b"%d" % num_bytes, header]
    try:
        tensors = orjson.loads(header)
        starts = [t["data_offsets"][0] for n, t in tensors.items() if n != "__metadata__"]
    except (ValueError, AttributeError, TypeError, KeyError, IndexError):
        return b"\0".join(parts)  # not safetensors, as check_checkpoint will say
    for start in sorted(start for start in starts if type(start) is int):
        if 0 <= start < num_bytes:
            parts.append(os.pread(descriptor, _OLD_SAMPLE_BYTES, 8 + length + start))
    return b"\0".join(parts)


def _hash_sample(file: Path, num_pages: int) -> bytes:
    """Of a file's header and about so many pages of its tensors."""
    tensors = read_header(file)
    first = min((tensor.start for tensor in tensors), default=0)
    data_bytes = sum(tensor.end - tensor.start for tensor in tensors) or 1
    extents = [(0, first)]
    for tensor in tensors:
        share = num_pages * (tensor.end - tensor.start) // data_bytes
        extents += _pages(tensor.start, tensor.end, max(2, share))
    descriptor = open_file(file)
    try:
        with ThreadPoolExecutor(_NUM_THREADS) as threads:
            # In groups: a task costs more than a page.
            groups = [extents[i : i + 64] for i in range(0, len(extents), 64)]
            digests = list(threads.map(lambda group: _hash_extents(descriptor, group), groups))
    except OSError as error:
        raise unreadable(file, error) from None
    finally:
        os.close(descriptor)
    return b"".join(digests)


def _pages(start: int, end: int, count: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of so many pages of a tensor, or of all of it where it is no larger."""
    last = end - _PAGE_BYTES
    if end - start <= count * _PAGE_BYTES:
        yield start, end - start
        return
    for i in range(count):
        yield start + (last - start) * i // (count - 1), _PAGE_BYTES


def _hash_extents(descriptor: int, extents: list[tuple[int, int]]) -> bytes:
    part = xxhash.xxh3_128()
    for offset, num_bytes in extents:
        part.update(os.pread(descriptor, num_bytes, offset))
    return part.digest()


def _hash_file(file: Path) -> bytes:
    descriptor = open_file(file)
    try:
        return _hash_descriptor(file, descriptor)
    finally:
        os.close(descriptor)


def _hash_descriptor(file: Path, descriptor: int) -> bytes:
    part, offset = xxhash.xxh3_128(), 0
    try:
        while chunk := os.pread(descriptor, _CHUNK_BYTES, offset):
            part.update(chunk)
            offset += len(chunk)
    except OSError as error:
        raise unreadable(file, error) from None
    return part.digest()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise unreadable(file, error) from None


# The cache: real path -> [device, inode, size, mtime, ctime, hash]


def _identity(status: os.stat_result) -> list[int]:
    return [
        *(status.st_dev, status.st_ino, status.st_size),
        *(status.st_mtime_ns, status.st_ctime_ns),
    ]


def cache_file() -> Path | None:
    """Where hashes of whole files are kept; None where there is no place for them."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "nanovllm" / "weights.json" if os.path.isabs(folder) else None


def _read_cache() -> dict[str, list[Any]]:
    """What is kept; a cache that is damaged, or another's, is an empty one."""
    path = cache_file()
    if path is None:
        return {}
    with suppress(OSError, ValueError, RecursionError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if status.st_uid != os.geteuid() or status.st_size > _MAX_CACHE_BYTES:
                return {}
            content = json.loads(file.read(_MAX_CACHE_BYTES))
        if isinstance(content, dict):
            return {name: entry for name, entry in content.items() if _is_entry(entry)}
    return {}


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and [type(value) for value in entry] == [int] * 5 + [str]
        and len(entry[-1]) == 32
    )


def _write_cache(cache: dict[str, list[Any]]) -> None:
    """Replace it whole, for this user alone; what cannot be kept is computed again."""
    path = cache_file()
    if path is None:
        return
    kept = dict(list(cache.items())[-_MAX_CACHED:])
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".weights", dir=path.parent)  # mode 0600
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(kept, file)  # ASCII: a name of any bytes comes back as it was
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
