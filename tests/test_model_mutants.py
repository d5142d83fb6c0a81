"""A checkpoint's files changed at random: it loads, or a ModelError names the file; nothing else.

Values of the JSON files are replaced by others of the wrong type or range, keys are dropped, bytes
are flipped, cut, zeroed and doubled. Everything that reads the files before an engine starts runs.
"""

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanovllm_cli.core.checkpoint import check_checkpoint
from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.engine import build_model
from nanovllm_cli.core.errors import ModelError
from nanovllm_cli.core.loader import load_weights
from nanovllm_cli.core.sampling_params import SamplingParams
from nanovllm_cli.models import default_sampling
from nanovllm_cli.tokenizer import PromptTokenizer
from nanovllm_cli.weights_hash import weights_fingerprint

from .cli import MODEL

JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
WEIGHTS = "model.safetensors"
FILES = (*JSON_FILES, WEIGHTS)
WRONG: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 1.5, -0.5, 1e308, 10**30, 2**31, 2**63, float("nan"),
    float("inf"), "", "x", "0", [], [1], ["a"], [None], {}, {"a": 1}, [[[]]], "\ud800", "a" * 9999,
]  # fmt: skip
# What the generation_config of the sample lacks, and others have.
MORE = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "attention_factor": 1.1,
    "truncate": True,
}


def values_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values of a JSON document are; of long lists only the first few."""
    places = [path] if path else []
    if isinstance(value, dict):
        for key in list(value)[:40]:
            places += values_of(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(3, len(value))):
            places += values_of(value[index], (*path, index))
    return places


def mutated_json(document: Any, dice: random.Random) -> str:
    """With one or two values replaced or dropped."""
    document = copy.deepcopy(document)
    for _ in range(dice.choice((1, 1, 2))):
        place = dice.choice(values_of(document) or [()])
        if not place:
            return json.dumps(dice.choice(WRONG))
        parent = document
        for key in place[:-1]:
            parent = parent[key]
        if dice.random() < 0.15:
            del parent[place[-1]]
        else:
            parent[place[-1]] = copy.deepcopy(dice.choice(WRONG))
    return json.dumps(document)


def mutated_bytes(content: bytes, dice: random.Random) -> bytes:
    """Flipped, cut, zeroed or doubled somewhere; of weights mostly in the header."""
    size = min(len(content), 20_000) if dice.random() < 0.7 else len(content)
    start = dice.randrange(size)
    end = min(len(content), start + dice.choice((1, 1, 8, 300, 5000)))
    kind = dice.choice(("flip", "cut", "zero", "double", "drop", "empty"))
    if kind == "empty":
        return b""
    if kind == "cut":
        return content[:start]
    part = content[start:end]
    new = {
        "flip": bytes(byte ^ 1 << dice.randrange(8) for byte in part),
        "zero": bytes(len(part)),
        "double": part * 2,
        "drop": b"",
    }[kind]
    return content[:start] + new + content[end:]


def use(path: Path) -> None:
    """What a job does with a model's files."""
    config = ModelConfig.from_directory(path)
    SamplingParams(**default_sampling(path))
    check_checkpoint(path, config)
    weights_fingerprint(path, is_whole=False)
    if config.max_context <= 1 << 14:  # its rotary tables alone could take gigabytes
        load_weights(build_model(config, EngineConfig()), path)


def use_tokenizer(path: Path) -> None:
    tokenizer = PromptTokenizer(path, parse_special=False)
    assert tokenizer is not None


def try_mutants(
    name: str,
    mutants: Callable[[random.Random], bytes],
    count: int,
    folder: Path,
    use: Callable[[Path], None] = use,
) -> None:
    path = Path(shutil.copytree(MODEL, folder / "model"))
    use(path)
    dice = random.Random(f"{name} {count}")
    num_refused = 0
    for number in range(count):
        content = mutants(dice)
        (path / name).write_bytes(content)
        refused = None
        try:
            use(path)
        except ModelError as error:
            refused = error.message
        except Exception as error:
            what = f"{name}, mutant {number}: {error!r}: {content[:3000]!r}"
            raise AssertionError(what) from error
        if refused is not None:
            num_refused += 1
            assert str(path) in refused, (number, content[:200], refused)
            assert len(refused) < 1000, refused
    assert num_refused


def json_mutants(document: Any) -> Callable[[random.Random], bytes]:
    return lambda dice: mutated_json(document, dice).encode()


def document_of(name: str) -> Any:
    document = json.loads((MODEL / name).read_bytes())
    return document | MORE if name == "generation_config.json" else document


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_wrong_values_of_a_json_file_are_errors_of_the_model(name: str, tmp_path: Path) -> None:
    try_mutants(name, json_mutants(document_of(name)), 120, tmp_path)


def test_wrong_values_of_yarn_are_errors_of_the_model(tmp_path: Path) -> None:
    document = {"rope_parameters": YARN}
    others = {k: v for k, v in document_of("config.json").items() if k != "rope_parameters"}

    def mutant(dice: random.Random) -> bytes:
        mutated = json.loads(mutated_json(document, dice))
        return json.dumps(others | mutated if isinstance(mutated, dict) else mutated).encode()

    try_mutants("config.json", mutant, 60, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", WEIGHTS])
def test_damaged_bytes_of_a_file_are_errors_of_the_model(name: str, tmp_path: Path) -> None:
    content = (MODEL / name).read_bytes()
    try_mutants(name, lambda dice: mutated_bytes(content, dice), 60, tmp_path)


def test_wrong_values_of_a_header_are_errors_of_the_model(tmp_path: Path) -> None:
    content = (MODEL / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]

    def mutant(dice: random.Random) -> bytes:
        text = mutated_json(header, dice).encode()
        return len(text).to_bytes(8, "little") + text + data

    try_mutants(WEIGHTS, mutant, 60, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_many_wrong_values_of_a_json_file(name: str, tmp_path: Path) -> None:
    try_mutants(name, json_mutants(document_of(name)), 3000, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", WEIGHTS])
def test_many_damaged_bytes(name: str, tmp_path: Path) -> None:
    content = (MODEL / name).read_bytes()
    try_mutants(name, lambda dice: mutated_bytes(content, dice), 1000, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_many_wrong_values_of_a_tokenizer(name: str, tmp_path: Path) -> None:
    mutants = json_mutants(document_of(name))
    try_mutants(name, mutants, 300, tmp_path, use_tokenizer)


@pytest.mark.long
@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_many_damaged_bytes_of_a_tokenizer(name: str, tmp_path: Path) -> None:
    content = (MODEL / name).read_bytes()
    try_mutants(name, lambda dice: mutated_bytes(content, dice), 150, tmp_path, use_tokenizer)
