"""The table of attacks names tests that are there."""

import re

from .cli import ROOT

TABLE = ROOT / "tests" / "attacks" / "README.md"


def test_every_test_that_the_table_names_is_there() -> None:
    num_named = 0
    for line in TABLE.read_text().splitlines():
        cells = line.strip("| ").split(" | ")
        if len(cells) != 3 or cells[2] in ("test", "---"):
            continue
        files = re.split(r"[;,] (?=test_)", cells[2])
        for named in files:
            file, _, names = named.partition(": ")
            source = (ROOT / "tests" / f"{file}.py").read_text()
            for name in filter(None, names.split(", ")):
                assert f"def test_{name.removesuffix('...')}" in source, (file, name)
                num_named += 1
    assert num_named > 30
