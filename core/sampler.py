"""Logits and the slot table's parameters -> the next tokens of some slots."""

import torch
from torch import Tensor

from nanovllm_cli.core.slot_table import NO_TOKEN, SlotTable
from nanovllm_cli.kernels.sampling import sample_reference


def sample(logits: Tensor, table: SlotTable, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The token after each slot's last: int64 [num_slots]; and whether its logits were not finite.

    logits: [num_slots, vocab_size], changed in place; slots: int64 [num_slots].
    """
    is_nan = ~torch.isfinite(logits.amax(dim=-1))
    logits[is_nan] = 0.0  # the row has failed; what is drawn for it is dropped
    position = table.length[slots]
    too_early = torch.nonzero(position < table.min_length[slots]).squeeze(1)
    if len(too_early):
        stops = table.stop_token_ids[slots[too_early]]
        rows, columns = torch.nonzero(stops != NO_TOKEN, as_tuple=True)
        logits[too_early[rows], stops[rows, columns]] = -torch.inf
    token_ids = sample_reference(
        logits,
        temperature=table.temperature[slots],
        top_k=table.top_k[slots],
        top_p=table.top_p[slots],
        min_p=table.min_p[slots],
        seed=table.seed[slots],
        position=position,
    )
    return token_ids, is_nan
