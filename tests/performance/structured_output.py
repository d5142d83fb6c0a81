"""Tokens per second of rows with a JSON schema, beside that of free ones of the same lengths.

    python tests/performance/structured_output.py --model Qwen3-0.6B        # one GPU
    python tests/performance/structured_output.py --rows 32 --tokens 64     # a CPU, sample model

With a name, the model has random weights in that size, and the tokenizer is made here: byte-level
BPE of as many of Qwen3's 151,643 tokens as the installed packages' Python files give, padded to
the model's vocabulary. Every row has --prompt tokens of its own and --tokens more, at temperature
1: free rows never stop, and the schema's array is longer than they are. Both give as many tokens;
the model likes every token as well as any other, and forced ones come as often as the schema has
them. Passes alternate, after one of each that is not counted.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, trainers

from nanovllm_cli.builtin_configs import builtin_config
from nanovllm_cli.core import guided
from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.engine import Engine
from nanovllm_cli.core.request import Completion, Request
from nanovllm_cli.core.sampling_params import SamplingParams
from nanovllm_cli.structured_output import grammar_text

SAMPLE_MODEL = Path(__file__).parent.parent.parent / "sample_data" / "model"
NUM_SCHEMAS = 8
TEXTS: dict[str, dict[str, Any] | None] = {
    "labels": None,
    "labels and a text": {"type": "string"},
    "labels and a text of at most 40 characters": {"type": "string", "maxLength": 40},
}
MAX_CHARACTERS = 100_000_000


def schema(number: int, text: dict[str, Any] | None) -> dict[str, Any]:
    """Of labels for many things at once, as in labelling and extraction; perhaps with a text."""
    properties: dict[str, Any] = {
        "kind": {"enum": ["question", "complaint", "praise", f"other {number}"]},
        "confidence": {"type": "integer", "minimum": 0, "maximum": 100},
        "is_urgent": {"type": "boolean"},
        "languages": {
            "type": "array",
            "items": {"enum": ["English", "German", "French", "Chinese"]},
            "minItems": 1,
            "maxItems": 3,
        },
    }
    if text is not None:
        properties["reason"] = text
    item = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "array", "items": item, "minItems": 100_000}


def make_tokenizer(path: Path, vocab_size: int) -> tuple[int, int]:
    """Writes tokenizer.json; the number of tokens, and which of them is eos."""
    sample = json.loads((SAMPLE_MODEL / "tokenizer.json").read_bytes())
    empty = {**sample, "added_tokens": [], "model": {**sample["model"], "vocab": {}, "merges": []}}
    tokenizer = Tokenizer.from_str(json.dumps(empty))

    def texts() -> Iterator[str]:
        left = MAX_CHARACTERS
        files = sorted(Path(tokenizers.__file__).parent.parent.rglob("*.py"))
        random.Random(0).shuffle(files)
        for file in files:
            text = file.read_text(encoding="utf-8", errors="replace")
            yield text
            left -= len(text)
            if left < 0:
                return

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts(),
        trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    tokenizer.save(str(path / "tokenizer.json"))
    return tokenizer.get_vocab_size(), tokenizer.token_to_id("<|im_end|>")


class Rows:
    """As many rows as asked for, free or guided, the same prompts each time."""

    def __init__(self, engine: Engine, vocab_size: int, arguments: argparse.Namespace) -> None:
        self._engine = engine
        self._num_tokens = arguments.tokens
        rng = random.Random(0)
        self._prompts = [
            [rng.randrange(256, vocab_size) for _ in range(arguments.prompt)]
            for _ in range(arguments.rows)
        ]

    def run(self, grammars: list[str] | None) -> tuple[float, int]:
        """Tokens per second, and how many were forced."""
        forced_before = self._engine.stats.num_forced_tokens
        start = time.perf_counter()
        for i, prompt in enumerate(self._prompts):
            sampling = SamplingParams(
                seed=i,
                max_tokens=self._num_tokens,
                ignore_eos=True,
                grammar=None if grammars is None else grammars[i % len(grammars)],
            )
            request = Request(request_id=i, prompt_token_ids=prompt, sampling=sampling)
            assert self._engine.add(request) is None, "it can run"
        num_tokens = 0
        while self._engine.has_work:
            for output in self._engine.step():
                assert isinstance(output, Completion), output
                assert output.finish_reason == "length", "every row has the same length"
                num_tokens += len(output.token_ids)
        seconds = time.perf_counter() - start
        return num_tokens / seconds, self._engine.stats.num_forced_tokens - forced_before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="Qwen3-0.6B, ...; default: the sample model")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps-only", action="store_true", help="every token takes a step")
    arguments = parser.parse_args()
    if arguments.steps_only:
        guided.forced_token_ids = lambda sequence: []
    config = EngineConfig(max_num_seqs=arguments.rows, tensor_parallel_size=arguments.tp)
    with tempfile.TemporaryDirectory() as directory:
        path, sizes = Path(directory), None
        if arguments.model is None:
            path, num_tokens = SAMPLE_MODEL, 1000
            sizes = ModelConfig.from_directory(path)
            engine = Engine.from_checkpoint(path, config)
        else:
            sizes = builtin_config(arguments.model)
            assert sizes is not None, f"{arguments.model} is no name of a model"
            num_tokens, eos = make_tokenizer(path, 151_643)
            sizes = replace(sizes, eos_token_ids=(eos,))
            engine = Engine.load(sizes, replace(config, tokenizer_path=str(path)))
        print(f"{engine.device}, {num_tokens} tokens and {sizes.vocab_size} logits", flush=True)
        rows = Rows(engine, num_tokens, arguments)
        for name, text in TEXTS.items():
            grammars = [grammar_text("json", schema(number, text)) for number in range(NUM_SCHEMAS)]
            rows.run(None)
            rows.run(grammars)
            free, with_schema, share = [], [], 0.0
            for _ in range(arguments.pairs):
                free.append(rows.run(None)[0])
                rate, num_forced = rows.run(grammars)
                with_schema.append(rate)
                share = num_forced / (arguments.rows * arguments.tokens)
            ratios = [with_it / without for with_it, without in zip(with_schema, free, strict=True)]
            print(
                f"{name}: free {statistics.median(free):.0f} tok/s, "
                f"JSON schema {statistics.median(with_schema):.0f} tok/s, "
                f"share {statistics.median(ratios):.1%} ({min(ratios):.1%} to {max(ratios):.1%}); "
                f"{share:.1%} of the tokens forced",
                flush=True,
            )
        engine.close()


if __name__ == "__main__":
    main()
