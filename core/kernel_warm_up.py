"""Compile the kernels of a model side by side, before anything is measured or captured.

Triton compiles a kernel in half a second to four, nearly all of it outside Python's lock: in
threads they take as long as the slowest. What is in Triton's cache on the disk is only loaded.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import torch
from torch import Tensor

from nanovllm_cli.core.attention_backend import AttentionBackend, PackedSequences
from nanovllm_cli.core.batch import MAX_FORCED_TOKENS
from nanovllm_cli.core.kv_cache import KVCache
from nanovllm_cli.core.qwen3 import DecoderLayer, Qwen3
from nanovllm_cli.kernels.decode_attention import DecodePlan, decode_attention
from nanovllm_cli.kernels.prefill_attention import prefill_attention
from nanovllm_cli.kernels.qk_norm_rope_store import LARGE_BATCH, qk_norm_rope_store
from nanovllm_cli.kernels.swiglu import swiglu


def layer_kernels(
    model: Qwen3,
    kv_cache: KVCache,
    block_tables: Tensor,
    plan: DecodePlan,
    backend: AttentionBackend,
) -> list[Callable[[], object]]:
    """Calls that run each kernel of a layer once, over zeros; pages get zeros in their block 0.

    block_tables: int32 [num_slots, max_blocks], of the scratch block.
    """
    sizes, weight = model.part, model.embed_tokens.weight
    layer = cast(DecoderLayer, model.layers[0])
    k, v = kv_cache.k, kv_cache.v

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=weight.dtype, device=weight.device)

    def ints(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=weight.device)

    def norm() -> None:
        layer.input_layernorm.add(zeros(1, sizes.hidden_size), zeros(1, sizes.hidden_size))

    def store(num_tokens: int) -> None:
        attention = layer.self_attn
        qk_norm_rope_store(
            zeros(num_tokens, len(attention.qkv_proj.weight)),
            attention.q_norm.weight,
            attention.k_norm.weight,
            attention.q_norm.eps,
            model.rotary.cos,
            model.rotary.sin,
            ints(num_tokens),
            ints(num_tokens).long(),
            k,
            v,
        )

    def prefill() -> None:
        sequences = PackedSequences(
            block_tables=ints(1, 1),
            rows=ints(1),
            start_positions=ints(1),
            kv_lens=ints(1) + 1,
            cu_seqlens_q=torch.arange(2, dtype=torch.int32, device=weight.device),
            cu_seqlens_k=torch.arange(2, dtype=torch.int32, device=weight.device),
            max_query_len=1024,  # for a few, our kernel has other tiles
            max_kv_len=1,
        )
        backend.prefill(zeros(1, sizes.num_attention_heads, sizes.head_dim), k, v, sequences)

    def short_prefill() -> None:
        q, one = zeros(1, sizes.num_attention_heads, sizes.head_dim), ints(1)
        bounds = torch.arange(2, dtype=torch.int32, device=weight.device)
        prefill_attention(q, k, v, block_tables, one, bounds, one, MAX_FORCED_TOKENS)

    def decode() -> None:
        # As many rows as the plan may have just been made for.
        q = zeros(len(plan.arrivals), sizes.num_attention_heads, sizes.head_dim)
        decode_attention(q, k, v, block_tables, plan)

    return [
        prefill,
        short_prefill,
        decode,
        lambda: store(LARGE_BATCH),
        lambda: store(1),
        norm,
        lambda: swiglu(zeros(1, 2 * sizes.intermediate_size)),
    ]


def run_side_by_side(calls: Sequence[Callable[[], object]], device: torch.device) -> None:
    """Each call in a thread of its own, with this GPU; raises what one of them raises."""

    def run(call: Callable[[], object]) -> None:
        with torch.inference_mode(), torch.cuda.device(device):
            call()

    with ThreadPoolExecutor(len(calls), thread_name_prefix="warm-up") as pool:
        for done in [pool.submit(run, call) for call in calls]:
            done.result()
