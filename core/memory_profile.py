"""How much of a GPU's memory is left for the KV cache: the largest launches run once, measured."""

from collections.abc import Callable

import numpy as np
import torch

from nanovllm_cli.core.batch import Batch, BlockTableUpdate, DecodeBatch, PrefillBatch
from nanovllm_cli.core.qwen3 import Qwen3
from nanovllm_cli.core.resolved_config import ResolvedConfig
from nanovllm_cli.core.slot_table import SlotTable

_GRAPH_BYTES = 512 << 20  # left for the captured steps' own memory


def free_bytes(
    launch: Callable[[Batch], object], table: SlotTable, model: Qwen3, config: ResolvedConfig
) -> int:
    """What the worst prefill and the widest decode step leave of the allowed memory.

    Both run on the idle slot, over pages that are there.
    """
    device = table.length.device
    torch.cuda.reset_peak_memory_stats(device)
    num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
    query_len = min(config.max_num_batched_tokens // num_seqs, config.max_model_len - 1)
    query_lens = np.full(num_seqs, query_len, dtype=np.int32)
    nothing = np.zeros(0, dtype=np.int32)
    update = BlockTableUpdate(slots=nothing, indices=nothing, block_ids=nothing)
    launch(
        PrefillBatch(
            admissions=(),
            block_table_update=update,
            slots=np.full(num_seqs, table.idle_slot, dtype=np.int32),
            token_ids=np.zeros(num_seqs * query_len, dtype=np.int32),
            start_positions=np.zeros(num_seqs, dtype=np.int32),
            query_lens=query_lens,
            is_last_chunk=np.zeros(num_seqs, dtype=np.bool_),
        )
    )
    idle = np.full(config.max_num_seqs, table.idle_slot, dtype=np.int32)
    launch(DecodeBatch(block_table_update=update, slots=idle, num_steps=1))
    torch.cuda.synchronize(device)
    table.length.zero_()
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device)
    others = total - free - torch.cuda.memory_reserved(device)
    torch.cuda.empty_cache()
    kept = _GRAPH_BYTES
    if config.tensor_parallel_size > 1:  # every rank's logits, and the same side by side
        kept += 2 * config.max_num_seqs * model.config.vocab_size * model.norm.weight.itemsize
    return int(total * config.gpu_memory_utilization) - others - peak - kept
