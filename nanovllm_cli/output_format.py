"""Which names an output may have: the name's end says the format, and another one is refused.

Asked before anything is loaded. Imports nothing slow.
"""

import os
from pathlib import Path

from .exit_code import CommandError

_COMPRESSED = (".gz", ".zst")
_LINES = (".jsonl", ".ndjson")
_SUPPORTED = ".jsonl or .ndjson, also with .gz or .zst behind it, and .parquet"
_HINTS = {
    ".json": "JSON lines are written, an object a line: end the name in .jsonl.",
    ".csv": "Write .parquet, then: duckdb -c \"copy 'out.parquet' to 'out.csv'\"",
}
_HINTS[".tsv"] = _HINTS[".xlsx"] = _HINTS[".csv"]


def check_output_name(name: str) -> None:
    """Raise CommandError if OUTPUT is a directory, or its name ends in what is not written here.

    A name without an extension, or with a number in its place, is of JSON lines.
    """
    if name == "-":
        return
    path = Path(name)
    if name.endswith(os.sep) or os.path.isdir(name):  # of pathlib, a name too long is an error
        raise CommandError(
            f"{name} is a directory", f"Name a file in it: -o {os.path.join(name, 'out.jsonl')}"
        )
    inner = path.with_suffix("") if path.suffix in _COMPRESSED else path
    suffix = inner.suffix
    is_lines = suffix in _LINES or not any(map(str.isalpha, suffix))
    if is_lines or (suffix == ".parquet" and inner is path):
        return
    ending = path.name[len(inner.stem) :]
    hint = _HINTS.get(suffix.lower(), f"End the name in {_SUPPORTED}.")
    if suffix.lower() in (*_LINES, *_COMPRESSED, ".parquet") and suffix != suffix.lower():
        hint = f"Write it in lower case: {suffix.lower()}."
    raise CommandError(f"{name} ends in {ending}, which is not a format that is written", hint)
