"""tokenizer.json and tokenizer_config.json, damaged at random: they load, or are a broken model."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm_cli.core.errors import ModelError
from nanovllm_cli.prompt_options import PromptOptions
from nanovllm_cli.prompts import Prompt, to_prompt
from nanovllm_cli.rows import Row
from nanovllm_cli.tokenizer import PromptTokenizer

from .cli import MODEL

NAMES = ("tokenizer.json", "tokenizer_config.json")
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, 1e308, 2**70, "", "x", "<|im_end|>", [], {}, [1], ["a"],
    {"a": 1}, [[["x"]]], "\x00", "\ufffd",
]  # fmt: skip
ROWS = [
    {"prompt": "Hello w\u00f6rld 12 <|im_end|>"},
    {"messages": [{"role": "user", "content": "Hi"}]},
]


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values stand in a JSON value; of a vocabulary only some."""
    items: list[Any] = []
    if isinstance(value, dict):
        items = list(value)
    elif isinstance(value, list):
        items = list(range(len(value)))
    for key in items if len(items) < 60 else items[:: len(items) // 20]:
        yield (*place, key)
        yield from places(value[key], (*place, key))


def mutant(content: Any, rng: random.Random) -> bytes:
    """A file with one or two values of a wrong type, or gone; a fifth with wrong bytes too."""
    for _ in range(rng.choice((1, 1, 2))):
        *way, last = rng.choice(list(places(content)))
        holder = content
        for key in way:
            holder = holder[key]
        if isinstance(holder, dict) and rng.random() < 0.15:
            del holder[last]
        else:
            holder[last] = rng.choice(VALUES)
    data = bytearray(json.dumps(content).encode())
    if rng.random() < 0.2:
        for _ in range(3):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
    return bytes(data)


@pytest.mark.parametrize(
    "count", [150, pytest.param(3000, marks=pytest.mark.long)], ids=["some", "many"]
)
def test_a_damaged_tokenizer_loads_or_is_a_broken_model(count: int, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    found = [to_prompt(Row(index=0, source="x", line=1, raw=None, columns=row), PromptOptions())
             for row in ROWS]  # fmt: skip
    prompts = [prompt for prompt in found if isinstance(prompt, Prompt)]
    rng = random.Random(count)
    num_refused = num_loaded = 0
    for _ in range(count):
        for name in NAMES:
            shutil.copyfile(MODEL / name, folder / name)
        name = rng.choice(NAMES)
        (folder / name).write_bytes(mutant(json.loads((MODEL / name).read_bytes()), rng))
        try:
            tokenizer = PromptTokenizer(folder)
        except ModelError:
            num_refused += 1
            continue
        num_loaded += 1
        for ids in tokenizer.encode(prompts):
            if isinstance(ids, list):
                tokenizer.decode_completion(ids, ids)
        tokenizer.bad_words(["x"])
        assert tokenizer.first_token_id is None or tokenizer.first_token_id >= 0
    assert num_refused > count // 5
    assert num_loaded > count // 5
