"""Random JSON schemas, and what the tests of grammars do with them."""

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from nanovllm_cli.core.batch import Int32
from nanovllm_cli.core.grammar import Grammars
from nanovllm_cli.structured_output import grammar_text

MODEL = Path(__file__).parent.parent / "sample_data" / "model"
VOCAB_SIZE = 1088
EOS = (1002, 1000)  # <|im_end|>, <|endoftext|>
_WORDS = [
    *("name", "size", "colour", "owner", "street", "city", "note"),
    *("count", "price", "state", "kind", "tag", "level", "part"),
]


def sample_grammars() -> Grammars:
    """For the tokens of the sample model."""
    return Grammars(MODEL, vocab_size=VOCAB_SIZE, eos_token_ids=EOS)


def random_schema(seed: int) -> dict[str, Any]:
    """An object's, two or three levels deep; one of some seed is one of no other seed."""
    rng = random.Random(seed)
    schema = _object(rng, depth=2)
    schema["properties"][f"id{seed}"] = {"const": seed}
    schema["required"].append(f"id{seed}")
    return schema


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_WORDS, rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _value(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.8],
        "additionalProperties": False,
    }


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = ["string", "pattern", "integer", "number", "boolean", "enum", "null"]
    kind = rng.choice(kinds + ["object", "array", "anyOf"] * (depth > 0))
    if kind == "object":
        return _object(rng, depth)
    if kind == "array":
        most = rng.randint(1, 3)
        return {
            "type": "array",
            "items": _value(rng, depth - 1),
            "minItems": rng.randint(0, most),
            "maxItems": most,
        }
    if kind == "anyOf":
        return {"anyOf": [_value(rng, depth - 1), {"type": "null"}]}
    if kind == "string":
        return {"type": "string", "maxLength": rng.randint(0, 12)}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[0-9]{4}-[0-9]{2}$", "^(a|bc)+$"])}
    if kind == "integer":
        low = rng.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}
    if kind == "enum":
        return {"enum": rng.sample(["red", "green", "dark blue", 1, 2.5, None, True], 3)}
    return {"type": kind}


def grammar_of_schema(schema: dict[str, Any]) -> str:
    """llguidance's text, as the command line makes it."""
    return grammar_text("json", schema)


def check_json(text: str, schema: dict[str, Any]) -> None:
    """Fails unless `text` is JSON that the schema describes."""
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def allowed(mask: Int32) -> list[int]:
    """The tokens that one row of masks allows."""
    ids: list[int] = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
    return ids
