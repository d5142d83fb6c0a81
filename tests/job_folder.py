"""A directory with the input and the output of a job, which runs here with a fake engine.

Everything but the model is the real thing.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nanovllm_cli import pipeline, run_rows
from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.exit_code import CommandError
from nanovllm_cli.options import GenerateOptions
from nanovllm_cli.tokenizer import PromptTokenizer

from .cli import MODEL, write_rows
from .fake_engine import FakeEngine, loader

Rows = list[dict[str, Any]]


@cache
def _tokenizer() -> PromptTokenizer:
    """Loaded once: it takes longer than a job with the fake engine."""
    return PromptTokenizer(MODEL)


class Stopped(Exception):
    """Ends a job in the middle, as a failing engine would."""


class StoppingEngine(FakeEngine):
    def __init__(self, num_steps: int, **more: Any) -> None:
        super().__init__(**more)
        self._num_steps_left = num_steps

    def step(self) -> Any:
        self._num_steps_left -= 1
        if self._num_steps_left < 0:
            raise Stopped
        return super().step()


def never_loads(path: Path, config: EngineConfig) -> Any:
    raise AssertionError("the model was loaded")


class JobFolder:
    """A job's input and output in a directory."""

    def __init__(self, path: Path, rows: Rows, name: str = "out.jsonl") -> None:
        path.mkdir()
        self.path = path
        self.input = write_rows(path / "in.jsonl", rows)
        self.output = path / name

    def options(self, **more: Any) -> GenerateOptions:
        engine = EngineConfig(device="cpu", max_num_seqs=8)
        given: dict[str, Any] = {
            "inputs": [str(self.input)],
            "output": str(self.output),
            "model": str(MODEL),
            "engine": engine,
            "max_inflight": 32,
            "quiet": True,
        }
        return GenerateOptions(**{**given, **more})

    def run(self, fake: FakeEngine | None = None, **more: Any) -> tuple[int, int]:
        """The exit code, and how many requests the engine got."""
        fake = fake or FakeEngine()
        return self._generate(loader(fake), **more), fake.num_added

    def stop_after(self, num_steps: int, **more: Any) -> None:
        with pytest.raises(Stopped):
            self.run(StoppingEngine(num_steps), **more)
        assert self.journal.exists()

    def done(self, **more: Any) -> int:
        """The exit code of a run that must not load the model."""
        return self._generate(never_loads, **more)

    def refused(self, **more: Any) -> CommandError:
        """How a run that must not load the model is refused."""
        with pytest.raises(CommandError) as error:
            self._generate(never_loads, **more)
        return error.value

    @property
    def journal(self) -> Path:
        return self._beside("partial")

    @property
    def errors(self) -> Path:
        return self._beside("errors.jsonl")

    @property
    def stats(self) -> dict[str, Any]:
        return json.loads(self._beside("stats.json").read_bytes())

    @property
    def names(self) -> set[str]:
        return {path.name for path in self.path.iterdir()} - {"in.jsonl"}

    @property
    def journalled(self) -> list[int]:
        """The numbers of the rows in the journal, in its order."""
        lines = self.journal.read_bytes().splitlines()[1:]
        claims = [line for line in lines if not line or line.startswith(b"owner ")]
        assert claims, "each run that opens a journal claims it"
        return [int(line.split(b" ", 4)[3]) for line in lines if line not in claims]

    def _generate(self, load: Any, **more: Any) -> int:
        with mock.patch.object(run_rows, "load_tokenizer", return_value=_tokenizer()):
            return int(pipeline.generate(self.options(**more), load))

    def _beside(self, what: str) -> Path:
        return self.output.with_name(f"{self.output.name}.{what}")


def good_rows(count: int, start: int = 0) -> Rows:
    return [{"id": n, "prompt": f"row {n}"} for n in range(start, start + count)]


def mixed_rows(count: int) -> Rows:
    """Every fifth row has no prompt."""
    return [row if row["id"] % 5 != 3 else {"id": row["id"]} for row in good_rows(count)]


def append(path: Path, rows: Rows) -> None:
    """Let a file grow."""
    with open(path, "ab") as file:
        for row in rows:
            file.write(json.dumps(row).encode() + b"\n")
