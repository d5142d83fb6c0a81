"""InputFile -> its lines, decompressed, in bounded memory.

gzip has a checksum in every member. zstd may be written without: then a flipped bit may go unseen,
as in a plain file, while a truncated file is always found.
"""

import re
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import chain

from .input_file import InputFile, format_of, unusable

MAX_LINE_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 20
_COMPRESSED_CHUNK_BYTES = 1 << 16
_MAX_BLANK_BYTES = 1 << 10
_SHORT_LINE_BYTES = 16
_LONG_BLANK = re.compile(rb"\n\s{256,}")
_BOM = b"\xef\xbb\xbf"


def line_blocks(file: InputFile) -> Iterator[tuple[int, list[bytes]]]:
    """Lines, split at newlines only, as many at a time as a chunk ends, and the first one's number.

    Of a line over MAX_LINE_BYTES comes the beginning alone, one byte longer than the limit. Blank
    lines may be left out, but are counted: a file may hold billions of them.
    """
    rest = bytearray()
    number = 1
    is_first = True
    for chunk in chain(chain.from_iterable(map(_pieces, _chunks(file))), [b"\n"]):
        if len(rest) <= _MAX_BLANK_BYTES and not rest.strip():
            chunk, num_skipped = _without_blank_lines(chunk)
            if num_skipped:
                number += num_skipped
                is_first = False
                rest.clear()
        head, newline, tail = chunk.partition(b"\n")
        if len(rest) <= MAX_LINE_BYTES:
            rest += head
        if len(rest) > MAX_LINE_BYTES:
            rest[MAX_LINE_BYTES:] = b"+"  # not blank, whatever was cut off
        if not newline:
            continue
        lines = tail.split(b"\n")
        lines.insert(0, bytes(rest))
        rest = bytearray(lines.pop())
        if is_first:
            is_first = False
            lines[0] = lines[0].removeprefix(_BOM)
            if format_of(lines[0], file.source.name) != "json":
                message = f"{file.source.name} holds another compressed or Parquet file"
                raise unusable(message, "Decompress it first.")
        yield number, lines
        number += len(lines)


def _pieces(chunk: bytes) -> Iterator[bytes]:
    """The chunk, parted before each long run of blank lines if it has any."""
    start = 0
    if (
        not _is_newlines(chunk) and chunk.count(b"\n") > len(chunk) // _SHORT_LINE_BYTES
    ):  # seldom, as every row has some bytes
        for match in _LONG_BLANK.finditer(chunk):
            yield chunk[start : match.start() + 1]
            start = match.start() + 1
    yield chunk[start:]


def _is_newlines(chunk: bytes) -> bool:
    """Whether it is nothing else; in a tenth of the time that counting takes."""
    return chunk.startswith(b"\n\n") and chunk == b"\n" * len(chunk)


def _without_blank_lines(chunk: bytes) -> tuple[bytes, int]:
    """The chunk from its first line that is not blank on, and the number of lines before it."""
    if _is_newlines(chunk):
        return b"", len(chunk)
    text = chunk.lstrip()
    start = chunk.rfind(b"\n", 0, len(chunk) - len(text)) + 1
    return chunk[start:], chunk.count(b"\n", 0, start)


def _chunks(file: InputFile) -> Iterator[bytes]:
    """The content, decompressed."""
    if file.format == "gzip":
        return _gunzip(file)
    if file.format == "zstd":
        return _unzstd(file)
    return iter(partial(file.read, _CHUNK_BYTES), b"")


def _gunzip(file: InputFile) -> Iterator[bytes]:
    """All members; unlike with the gzip module, only a member may follow a member."""
    decoder = None
    while data := file.read(_COMPRESSED_CHUNK_BYTES):
        while data:
            decoder = decoder or zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
            try:
                chunk = decoder.decompress(data, _CHUNK_BYTES)
            except zlib.error as error:
                raise file.damaged(error) from error
            if chunk:
                yield chunk
            data = decoder.unconsumed_tail
            if decoder.eof:
                data, decoder = decoder.unused_data, None
    if decoder is not None:
        raise file.damaged("it ends before its last gzip member does")


def _unzstd(file: InputFile) -> Iterator[bytes]:
    import pyarrow as pa  # late: most inputs need none of it

    try:
        with pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise file.damaged(error) from error
