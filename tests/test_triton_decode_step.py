"""The two ends of a captured step, against what the CPU's runner does to its slot table."""

import torch

from nanovllm_cli.core.slot_table import SlotTable
from nanovllm_cli.kernels.decode_step import OUT_ROWS_BEFORE_TOKENS, advance, prepare

from .triton_tests import DEVICE

BLOCK_SIZE = 16


def table_of(lengths: list[int], max_lengths: list[int]) -> SlotTable:
    """A slot for each length, in order, running; int32 columns as on a GPU."""
    table = SlotTable(len(lengths), 8, DEVICE)
    names = ("last_token", "length", "min_length", "max_length", "top_k", "block_table")
    for name in (*names, "stop_token_ids"):
        setattr(table, name, getattr(table, name).int())
    count = len(lengths)
    table.length[:count] = torch.tensor(lengths, device=DEVICE)
    table.max_length[:count] = torch.tensor(max_lengths, device=DEVICE)
    table.last_token[:count] = torch.arange(count, device=DEVICE) + 100
    table.is_finished[:count] = False
    blocks = torch.arange(count * 8, device=DEVICE).view(count, 8) + 1
    table.block_table[:count] = blocks
    return table


def ints(*shape: int, fill: int = -7, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.full(shape, fill, dtype=dtype, device=DEVICE)


def test_prepare_gathers_live_slots_and_parks_the_others() -> None:
    table = table_of([1, 16, 17, 40], [99] * 4)
    table.is_finished[1] = True
    slots = torch.tensor([3, 1, 0, 2, table.idle_slot], device=DEVICE).int()
    token_ids, positions, step = ints(5), ints(5), ints(1, fill=0)
    slot_mapping, context_lens = ints(5, dtype=torch.int64), ints(5)
    prepare(
        slots,
        table,
        token_ids=token_ids,
        positions=positions,
        slot_mapping=slot_mapping,
        context_lens=context_lens,
        step=step,
        block_size=BLOCK_SIZE,
    )
    assert token_ids.tolist() == [103, 0, 100, 102, 0]
    assert positions.tolist() == [39, 0, 0, 16, 0]
    expected = [(24 + 2 + 1) * 16 + 39 % 16, 0, 1 * 16, (16 + 1 + 1) * 16 + 0, 0]
    assert slot_mapping.tolist() == expected
    assert context_lens.tolist() == [1, 0, 17, 40, 0], "by slot"
    assert step.tolist() == [1]


def test_advance_stores_tokens_and_finishes_what_stops_fails_or_is_full() -> None:
    table = table_of([5, 6, 7, 8, 9], [99, 99, 99, 9, 99])
    table.stop_token_ids[1, 3] = 11
    table.is_finished[4] = True
    slots = torch.tensor([0, 1, 2, 3, 4, table.idle_slot], device=DEVICE).int()
    sampled = torch.tensor([11, 11, 12, 13, 14, 15], device=DEVICE).int()
    is_nan = torch.tensor([0, 0, 1, 0, 1, 0], device=DEVICE).to(torch.int8)
    out = ints(OUT_ROWS_BEFORE_TOKENS + 3, 8, fill=0)
    step = ints(1, fill=2)
    advance(slots, sampled, is_nan, table, out=out, step=step)
    assert out[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert out[1].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert out[2].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert out[OUT_ROWS_BEFORE_TOKENS + 1].tolist() == [11, 11, 12, 13, 0, 0, 0, 0]
    assert out[OUT_ROWS_BEFORE_TOKENS].tolist() == [0] * 8
    assert table.length.tolist() == [6, 7, 8, 9, 9, 0]
    assert table.last_token.tolist() == [11, 11, 12, 13, 104, 0]
    assert table.is_finished.tolist() == [False, True, True, True, True, True]
