"""An input that is neither JSON lines nor Parquet: what it seems to be, and how it becomes one."""

import csv
import shlex
from pathlib import Path
from typing import NamedTuple

from .exit_code import CommandError
from .input_file import opened
from .input_lines import line_blocks
from .inputs import Source

_FROM_CSV = (
    "import csv, json, sys; "
    "[print(json.dumps(row)) for row in csv.DictReader("
    "open(sys.argv[1], encoding='utf-8-sig', newline=''), delimiter={delimiter!r})]"
)
_HEAD_LINES = 20
_KINDS = {
    ".csv": "CSV",
    ".tsv": "tab-separated text",
    ".tab": "tab-separated text",
    ".yaml": "YAML",
    ".yml": "YAML",
    ".txt": "plain text",
    ".md": "plain text",
}


class Foreign(NamedTuple):
    """What an input is, in words, and the command that makes JSON lines of it."""

    what: str
    command: str


def foreign_input(name: str) -> Foreign | None:
    """What the file `name` is by its name and its first lines; None if nothing is known of it."""
    path = Path(name)
    try:
        if not path.is_file():
            return None
        with opened(Source(name=name, path=path)) as file:
            if file.format == "parquet":
                return None
            _, lines = next(line_blocks(file))
    except (CommandError, OSError, StopIteration):
        return None
    return _foreign(name, [line.decode(errors="replace") for line in lines[:_HEAD_LINES]])


def _foreign(name: str, lines: list[str]) -> Foreign | None:
    path = Path(name)
    compressed = path.suffix.lower() in (".gz", ".zst")
    ending, stem = path.suffix, str(path.with_suffix(""))
    made = f"{stem}.jsonl"
    if made == name:  # a shell would empty it before it is read
        made = f"{stem}.rows.jsonl"
    given, made = shlex.quote(name), shlex.quote(made)
    first = next((line.strip() for line in lines if line.strip()), "")
    kind = _KINDS.get(ending.lower())
    if compressed:
        return None  # its commands would read what is not text
    if first.startswith("[") and sum(line.lstrip().startswith("[") for line in lines) == 1:
        return Foreign("a JSON array", f"jq -c '.[]' {given} > {made}")
    if first.startswith("{") and not first.endswith("}"):
        return Foreign("JSON over several lines", f"jq -c . {given} > {made}")
    if kind == "YAML":
        return Foreign("YAML", f"yq -o json -I 0 '.[]' {given} > {made}")
    if kind is None and ending.lower() not in ("", ".jsonl", ".json", ".ndjson"):
        return None
    delimiter = _delimiter(first, ending.lower())
    if kind in ("CSV", "tab-separated text") or (kind is None and delimiter and len(lines) > 1):
        what = kind or ("tab-separated text" if delimiter == "\t" else "CSV")
        script = shlex.quote(_FROM_CSV.format(delimiter=delimiter or ","))
        return Foreign(what, f"python3 -c {script} {given} > {made}")
    if kind == "plain text":
        return Foreign(kind, f"jq -cR '{{prompt: .}}' {given} > {made}")
    return None


def _delimiter(header: str, ending: str) -> str | None:
    """What stands between the columns of a header; None if it has one column."""
    if ending in (".tsv", ".tab"):
        return "\t"
    found = max(",;\t|", key=header.count)
    try:
        names = next(csv.reader([header], delimiter=found), [])
    except csv.Error:
        return None
    return found if len(names) > 1 else None
