"""What several test files share: tiny checkpoints made here, never downloaded, and a way to run."""

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from nanovllm_cli.core.engine import Engine
from nanovllm_cli.core.request import Completion, Failure, Request
from nanovllm_cli.kernels.triton_import import HAS_TRITON
from nanovllm_cli.options import GenerateOptions

# Triton is chosen when the kernels are imported: test_kernels_interpreted.py runs these apart.
collect_ignore_glob = [] if HAS_TRITON else ["test_triton_*.py"]

# The same examples on every run: a red test is red again, and nothing is written to the checkout.
settings.register_profile("push", derandomize=True, deadline=None, database=None)
settings.load_profile("push")

# Under nohup, and in the background of a script, these are ignored, and would be so in every job
# that a test starts: a command leaves ignored what it finds ignored.
for _number, _default in (
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGINT, signal.default_int_handler),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _default)

# Models this small only lose time to threads; the number never changes within a run.
torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

MakeCheckpoint = Callable[..., Path]
RunEngine = Callable[[Engine, Iterable[Request]], dict[int, Completion | Failure]]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """A function that makes a random Qwen3 checkpoint with transformers; equal wishes, equal one.

    Keywords: those of Qwen3Config, and `seed`, `std` (of the weights), `eos` (what
    generation_config.json says) and `max_shard_size`. The directory is shared: copy it to change
    it.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM  # takes seconds: only who needs it
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    made: dict[str, Path] = {}

    def make(
        *,
        seed: int = 0,
        std: float = 0.08,
        eos: int | list[int] | None = None,
        max_shard_size: str = "5GB",
        dtype: str = "float32",
        **config: Any,
    ) -> Path:
        key = repr((seed, std, eos, max_shard_size, dtype, sorted(config.items())))
        if key in made:
            return made[key]
        sizes = {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size": 96,
            "vocab_size": 160,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        }
        model = Qwen3ForCausalLM(Qwen3Config(**{**sizes, **config}))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(0.0, std, generator=generator)
                if name.endswith("norm.weight"):
                    parameter.add_(1.0)
        model.generation_config.eos_token_id = eos
        path = tmp_path_factory.mktemp("checkpoint")
        model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=max_shard_size)
        made[key] = path
        return path

    return make


@pytest.fixture(scope="session")
def run_engine() -> RunEngine:
    """A function that runs requests to their ends: request id -> Completion or Failure."""

    def run(engine: Engine, requests: Iterable[Request]) -> dict[int, Completion | Failure]:
        outputs: list[Completion | Failure] = []
        outputs += [failure for r in requests if (failure := engine.add(r)) is not None]
        while engine.has_work:
            outputs += [o for o in engine.step() if isinstance(o, Completion | Failure)]
        ended = {output.request_id: output for output in outputs}
        assert len(ended) == len(outputs), "a request ended twice"
        return ended

    return run


@pytest.fixture
def chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[GenerateOptions]:
    """The options of each job that is begun from here on, of x.jsonl or y.jsonl; no job runs."""
    seen: list[GenerateOptions] = []

    def begin(options: GenerateOptions, **_: object) -> int:
        seen.append(options)
        return 0

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("x.jsonl", "y.jsonl"):
        Path(name).touch()
    monkeypatch.setattr("nanovllm_cli.pipeline.generate", begin)
    monkeypatch.setattr("nanovllm_cli.dry_run.dry_run", begin)
    return seen
