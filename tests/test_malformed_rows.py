"""100,000 malformed lines: no exception, every line counted once, and little memory.

The job runs in a process of its own (this file as a script), whose memory can be measured.
"""

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import orjson

from nanovllm_cli.inputs import find_inputs
from nanovllm_cli.prompt_options import PromptOptions
from nanovllm_cli.prompts import Prompt, to_prompt
from nanovllm_cli.rows import Row, check_inputs, read_rows

NUM_LINES = 100_000
MAX_RSS_BYTES = 300 << 20
LONG_LINE_BYTES = 64 << 20

GOOD = [
    {"id": "a", "prompt": "Write a haiku."},
    {"id": 7, "prompt": "Count to ten.", "temperature": 0.5, "max_tokens": 16, "label": None},
    {"id": "b", "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]},
    {"prompt_token_ids": [1, 2, 3], "stop": ["\n"], "seed": 3, "n": 2},
    {
        "custom_id": "c",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": [{"role": "user", "content": "z"}], "top_p": 0.9},
    },
]
GOOD_LINES = [json.dumps(row).encode() for row in GOOD]
VALUES: list[object] = [
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
    "",
    "x",
    [],
    [None],
    [[]],
    {},
    {"a": 1},
    "\u2028",
    [1, "2"],
]
SPLICES = [
    *(b"NaN", b"-Infinity", b"1e999", b'"\\ud800"', b'"\\udc00\\ud800"', b"\xef\xbb\xbf", b"\r"),
    *(b"\xe2\x80\xa8", b"\0", b"\xff\xfe", b"\xc0\x80", b"\n", b"{", b"}", b'"', b"\\", b"\r\n"),
]


def malformed_lines(rng: random.Random) -> Iterator[bytes]:
    """Lines, some with a newline within, none longer than some 200,000 bytes."""
    for at in range(NUM_LINES):
        line = bytearray(GOOD_LINES[at % len(GOOD_LINES)])
        kind = rng.randrange(12)
        place = rng.randrange(len(line))
        if kind <= 2:
            line[place:place] = rng.choice(SPLICES)
        elif kind <= 4:
            del line[place:]
        elif kind <= 6:
            for _ in range(rng.randrange(1, 4)):
                line[rng.randrange(len(line))] = rng.randrange(256)
        elif kind <= 9:
            line = bytearray(json.dumps(with_a_wrong_value(rng, at)).encode())
        elif kind == 10:
            line[-1:] = b", " + line[1:]  # every key twice
            if at % 3 == 0:
                line = bytearray(b"[%s]" % line)
        else:
            line += rng.choice([b"\r", b" ", b"\t\r", b"\r\r", b"\n\n \n", bytes(line), b",[]"])
        if at % 2000 == 0:
            depth = 100_000
            line = bytearray(b'{"a":' * (depth // 2) if at % 4000 else b'{"a":' + b"[" * depth)
        yield bytes(line)


def with_a_wrong_value(rng: random.Random, at: int) -> dict[str, object]:
    """A good row with one value, at the top or a level below, of some other type."""
    row: dict[str, object] = json.loads(GOOD_LINES[at % len(GOOD_LINES)])
    inner = row.get("body", row)
    assert isinstance(inner, dict)
    target: dict[str, object] = rng.choice([row, inner])
    name = rng.choice([*target, "stop", "n", "chat_template_kwargs", "best_of", f"top_{at % 50}"])
    target[name] = rng.choice(VALUES)
    return row


def write_input(path: Path) -> int:
    """Write the lines; returns how many are not blank, counted by their bytes alone."""
    with path.open("wb") as file:
        for at, line in enumerate(malformed_lines(random.Random(0))):
            file.write((GOOD_LINES[0] if at == 0 else line) + b"\n")
            if at == NUM_LINES // 2:
                file.write(b'{"id": "long", "prompt": "')
                for _ in range(LONG_LINE_BYTES >> 20):
                    file.write(b"x" * (1 << 20))
                file.write(b'"}\n')
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def read_all(path: str) -> dict[str, object]:
    """What the process does: every row read and made a prompt, nothing kept."""
    sources = find_inputs([path])
    codes: Counter[str] = Counter()
    num_rows = num_good = longest_message = 0
    options = PromptOptions()
    for row in read_rows(sources):
        assert row.index == num_rows
        num_rows += 1
        result = to_prompt(row, options) if isinstance(row, Row) else row
        if isinstance(result, Prompt):
            num_good += 1
        else:
            codes[result.code] += 1
            longest_message = max(longest_message, len(result.message))
    status = Path("/proc/self/status").read_text()
    # VmHWM and not getrusage's ru_maxrss, which a process inherits from the one that starts it.
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return {
        "num_rows": num_rows,
        "num_good": num_good,
        "num_checked": check_inputs(sources),
        "codes": codes,
        "longest_message": longest_message,
        "peak_bytes": int(peak.split()[1]) << 10,
    }


def test_100_000_malformed_lines_are_counted_and_never_raise(tmp_path: Path) -> None:
    path = tmp_path / "malformed.jsonl"
    num_lines = write_input(path)
    assert num_lines > NUM_LINES
    run = subprocess.run([sys.executable, __file__, str(path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = orjson.loads(run.stdout)
    codes = found["codes"]
    assert found["num_rows"] == found["num_good"] + sum(codes.values()) == num_lines
    assert found["num_checked"] == num_lines
    assert found["peak_bytes"] <= MAX_RSS_BYTES
    assert found["num_good"] > NUM_LINES // 10
    assert found["longest_message"] < 500
    assert codes["line_too_long"] == 1
    seen = {"invalid_json", "not_an_object", "no_prompt", "empty_prompt", "bad_prompt", "bad_id"}
    seen |= {"bad_messages", "bad_parameters", "unknown_setting", "bad_openai_line"}
    assert seen <= set(codes)


if __name__ == "__main__":
    sys.stdout.buffer.write(orjson.dumps(read_all(sys.argv[1])))
