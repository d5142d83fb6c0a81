"""ResolvedConfig: an EngineConfig with every choice made, for the machine and the model at hand.

The GPU is asked of the driver and not of torch, which takes seconds to import: the job's own
process resolves a config before any engine starts.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from nanovllm_cli.core import cuda_driver
from nanovllm_cli.core.attention_choice import choose_attention_backend_name
from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.cuda_driver import Gpu
from nanovllm_cli.core.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedConfig:
    """An EngineConfig with every choice made for one machine and one model."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16", "float16"]
    tensor_parallel_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_cache_bytes: int | None
    gpu_memory_utilization: float
    enable_prefix_caching: bool
    enforce_eager: bool
    attention_backend: str | None  # the name of that of prefills on a GPU; None on a CPU
    max_window_steps: int
    max_launches_in_flight: int
    num_threads: int | None
    hash_bits: int


def resolve(config: EngineConfig, model: ModelConfig) -> ResolvedConfig:
    """Every choice made; raises UserError for what the machine or the model cannot do."""
    device = config.device
    if device == "auto":
        device = "cuda" if cuda_driver.visible_gpus() else "cpu"
    is_gpu = device == "cuda"
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if is_gpu else "float32"
    backend = None
    if is_gpu:
        backend = choose_attention_backend_name(
            config.attention_backend,
            dtype=dtype,
            block_size=config.block_size,
            capability=check_gpu().capability,
        )
    elif config.attention_backend != "auto":
        raise UserError(
            f"attention_backend is {config.attention_backend!r}, and the job runs on a CPU",
            "Leave out --attention-backend: a CPU has one way to attend.",
        )
    if config.tensor_parallel_size > 1:
        check_ranks(config.tensor_parallel_size, device, model)
    longest = model.max_context
    if (config.max_model_len or 1) > longest:
        raise UserError(
            f"max_model_len is {config.max_model_len}; the model was made for {longest}",
            "Longer contexts need a rope_parameters entry (YaRN) in the model's config.json.",
        )

    def choose(value: int | None, on_cpu: int, on_gpu: int) -> int:
        return value if value is not None else on_gpu if is_gpu else on_cpu

    return ResolvedConfig(
        device=device,
        dtype=dtype,
        tensor_parallel_size=config.tensor_parallel_size,
        max_model_len=config.max_model_len or longest,
        max_num_seqs=choose(config.max_num_seqs, 256, 1024),
        max_num_batched_tokens=choose(config.max_num_batched_tokens, 8192, 16384),
        block_size=config.block_size,
        kv_cache_bytes=config.kv_cache_bytes,
        gpu_memory_utilization=config.gpu_memory_utilization,
        enable_prefix_caching=config.enable_prefix_caching,
        enforce_eager=config.enforce_eager,
        attention_backend=backend,
        max_window_steps=choose(config.max_window_steps, 1, 32),
        max_launches_in_flight=choose(config.max_launches_in_flight, 0, 1),
        # One: the sums of a rank's threads would get among each other.
        num_threads=config.num_threads if config.tensor_parallel_size == 1 else 1,
        hash_bits=config.hash_bits,
    )


def check_gpu() -> Gpu:
    """Return the GPU that an engine runs on; raise UserError if nanovllm cannot run on it."""
    gpu = next(iter(cuda_driver.visible_gpus()), None)
    if gpu is None:
        raise UserError("there is no CUDA GPU that this torch can use", "Leave out --device.")
    if gpu.capability < (8, 0):
        raise UserError(
            f"{gpu.name} is {gpu.architecture}; nanovllm needs sm_80 or later",
            "Run on the CPU with --device cpu.",
        )
    if find_spec("triton") is None:
        raise UserError(
            "there is a GPU, and no Triton for its kernels",
            "Install triton beside this torch, or run on the CPU with --device cpu.",
        )
    return gpu


def check_ranks(size: int, device: str, model: ModelConfig) -> None:
    """Raise UserError if the model or the GPUs cannot be shared out to ranks."""
    what = f"tensor_parallel_size is {size}"
    why_not = why_not_shared(size, model)
    if why_not is not None:
        sizes = range(1, model.num_attention_heads + 1)
        possible = [n for n in sizes if not why_not_shared(n, model)]
        hint = f"Choose one of {', '.join(map(str, possible))}."
        raise UserError(f"{what}, and the model has {why_not}", hint)
    if device != "cuda":
        return
    gpus = cuda_driver.visible_gpus()
    if size > len(gpus):
        raise UserError(
            f"{what}, and this job sees {len(gpus)} GPUs",
            "Each rank needs a GPU of its own; CUDA_VISIBLE_DEVICES may hide some.",
        )
    names = dict.fromkeys(gpu.name for gpu in gpus[:size])
    if len(names) > 1:
        raise UserError(
            f"{what}, and the GPUs differ: {', '.join(names)}",
            "Ranks on different GPUs may draw different tokens. Choose GPUs that are alike "
            "with CUDA_VISIBLE_DEVICES.",
        )


def why_not_shared(size: int, model: ModelConfig) -> str | None:
    """What of a model so many ranks cannot share out."""
    if model.num_attention_heads % size:
        return f"{model.num_attention_heads} attention heads"
    if model.num_key_value_heads % size and size % model.num_key_value_heads:
        return f"{model.num_key_value_heads} key/value heads: neither divides the other"
    if model.intermediate_size % size:
        return f"an intermediate size of {model.intermediate_size}"
    return None
