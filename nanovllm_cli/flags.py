"""The flags that every command with an engine has: what runs, and how the engine runs it."""

from typing import Annotated

from nanovllm_cli.core.config import EngineConfig

from .settings import shared_option

MODEL, ENGINE, RUN = "Model", "Engine", "Run"
DEFAULTS = EngineConfig()

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
    int | None,
    shared_option("--max-model-len", panel=ENGINE, help="Prompt and completion at most."),
]
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
        help="Share the model out to so many GPUs; on a CPU, to so many processes.",
    ),
]  # fmt: skip
DataParallelSize = Annotated[
    int,
    shared_option(
        "--data-parallel-size", "-dp", "--dp", panel=ENGINE,
        help="So many engines, each on GPUs of its own, that share the rows; on a CPU, its cores.",
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
    int | None,
    shared_option(
        "--max-num-batched-tokens", panel=ENGINE,
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
        help="Of prefills on a GPU: triton, torch, flash-attn, flash-attn-3; auto is the best.",
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
