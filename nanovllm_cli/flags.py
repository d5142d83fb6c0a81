"""The flags that every command with an engine has: what runs, and how the engine runs it."""

from typing import Annotated, Any

from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.core.errors import UserError

from .setting_texts import (
    attention_backend_of,
    device_of,
    dtype_of,
    kv_cache_bytes,
    num_tokens_of,
)
from .settings import shared_option

MODEL, ENGINE, RUN = "Model", "Engine", "Run"
DEFAULTS = EngineConfig()
_MAX_NUM_SEQS = 1 << 20  # each has its row in the engine's tables

Model = Annotated[
    str,
    shared_option(
        "--model", "-m", panel=MODEL, metavar="NAME",
        help="A directory, Qwen3-0.6B ... Qwen3-32B, or org/name\\[@revision].",
    ),
]  # fmt: skip
DType = Annotated[
    str,
    shared_option(
        "--dtype", panel=MODEL, metavar="auto|float32|bfloat16|float16",
        help="auto: bfloat16 on a GPU, float32 on a CPU.",
    ),
]  # fmt: skip
MaxModelLen = Annotated[
    str | None,
    shared_option(
        "--max-model-len", panel=ENGINE, metavar="TOKENS",
        help="Prompt and completion at most: 4096, 32k (32,000), 32K (32,768); auto: the model's.",
    ),
]  # fmt: skip
Device = Annotated[
    str,
    shared_option(
        "--device", panel=ENGINE, metavar="auto|cpu|cuda", help="auto: a GPU where there is one."
    ),
]
TensorParallelSize = Annotated[
    int,
    shared_option(
        "--tensor-parallel-size", "-tp", "--tp", panel=ENGINE,
        help="Number of GPUs to split the model across; on a CPU, number of processes.",
    ),
]  # fmt: skip
DataParallelSize = Annotated[
    int,
    shared_option(
        "--data-parallel-size", "-dp", "--dp", panel=ENGINE,
        help="Number of engines that share the rows, each on its own GPUs; on a CPU, on its cores.",
    ),
]  # fmt: skip
MaxNumSeqs = Annotated[
    int | None,
    shared_option(
        "--max-num-seqs", panel=ENGINE,
        help="Sequences that run at a time; default: 1024 on a GPU, 256 on a CPU.",
    ),
]  # fmt: skip
MaxNumBatchedTokens = Annotated[
    str | None,
    shared_option(
        "--max-num-batched-tokens", panel=ENGINE, metavar="TOKENS",
        help="Prompt tokens in one prefill; default: 16384 on a GPU, 8192 on a CPU.",
    ),
]  # fmt: skip
GpuMemoryUtilization = Annotated[
    float,
    shared_option(
        "--gpu-memory-utilization", panel=ENGINE, help="Share of the GPU's memory to use."
    ),
]
AttentionBackend = Annotated[
    str,
    shared_option(
        "--attention-backend", panel=ENGINE, metavar="NAME",
        help="For prefills on a GPU: triton, torch, flash-attn, flash-attn-3; auto is the best.",
    ),
]  # fmt: skip
EnforceEager = Annotated[
    bool,
    shared_option(
        "--enforce-eager", panel=ENGINE, help="No CUDA graphs: a quicker start, slower steps."
    ),
]
BlockSize = Annotated[
    int,
    shared_option(
        "--block-size", panel=ENGINE, help="Tokens of a KV block, the grain of prefix caching."
    ),
]
NoPrefixCaching = Annotated[
    bool,
    shared_option("--no-prefix-caching", panel=ENGINE, help="Compute every prompt in full."),
]
Debug = Annotated[bool, shared_option("--debug", panel=RUN, help="Tracebacks for errors.")]


def engine_config(
    *,
    dtype: str,
    device: str,
    attention_backend: str,
    max_model_len: str | None,
    max_num_batched_tokens: str | None,
    kv_cache_memory: float | None = None,
    **more: Any,
) -> EngineConfig:
    """Return the engine's settings from flags as they were written; raises UserError."""
    num_seqs = more.get("max_num_seqs")
    if num_seqs is not None and num_seqs > _MAX_NUM_SEQS:
        raise UserError(f"--max-num-seqs is {num_seqs}; it must be at most {_MAX_NUM_SEQS}")
    return EngineConfig(
        dtype=dtype_of("--dtype", dtype),  # type: ignore[arg-type]  # one of its names
        device=device_of("--device", device),  # type: ignore[arg-type]  # likewise
        attention_backend=attention_backend_of(  # type: ignore[arg-type]  # likewise
            "--attention-backend", attention_backend
        ),
        max_model_len=num_tokens_of("--max-model-len", max_model_len),
        max_num_batched_tokens=num_tokens_of("--max-num-batched-tokens", max_num_batched_tokens),
        kv_cache_bytes=kv_cache_bytes("--kv-cache-memory", kv_cache_memory),
        **more,
    )
