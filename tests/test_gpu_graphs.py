"""A captured decode step against the same step run eagerly: the same bits, whatever is padding.

The sequences are made up: pages, lengths and last tokens are random, and nothing is prefilled. Rows
that fill a batch up read token 0, whose embedding is NaN, and write to the scratch block.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovllm_cli.core.batch import BatchResult, BlockTableUpdate, DecodeBatch
from nanovllm_cli.core.block_manager import SCRATCH_BLOCK
from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.core.cuda_graphs import graph_batch_sizes
from nanovllm_cli.core.gpu_runner import GpuRunner
from nanovllm_cli.core.resolved_config import resolve
from nanovllm_cli.core.slot_table import SlotTable

from .gpu_tests import HiddenStates, model_config, random_model

MAX_MODEL_LEN = 96
BLOCK_SIZE = 16
NOTHING = np.zeros(0, dtype=np.int32)
NO_UPDATE = BlockTableUpdate(slots=NOTHING, indices=NOTHING, block_ids=NOTHING)


@dataclass(frozen=True)
class Columns:
    """What a slot table holds, to be put back before every launch."""

    values: dict[str, Tensor]

    def write_to(self, table: SlotTable) -> None:
        for name, value in self.values.items():
            getattr(table, name).copy_(value)


def made_up_columns(table: SlotTable, vocab_size: int) -> Columns:
    """Every slot in the middle of its sequence; of the idle slot, whatever a kernel might heed."""
    rng = np.random.default_rng(0)
    num_slots = table.idle_slot
    per_sequence = table.block_table.shape[1]
    block_ids = 1 + rng.permutation(num_slots * per_sequence).reshape(num_slots, per_sequence)
    columns = {
        "last_token": rng.integers(1, vocab_size, num_slots),
        "length": rng.integers(1, MAX_MODEL_LEN - 2, num_slots),
        "min_length": np.zeros(num_slots),
        "max_length": np.full(num_slots, MAX_MODEL_LEN),
        "is_finished": np.zeros(num_slots),
        "seed": rng.integers(0, 2**63, num_slots),
        "temperature": rng.choice((0.0, 0.6, 1.0, 3.0), num_slots),
        "top_k": rng.choice((1, 20, vocab_size), num_slots),
        "top_p": rng.choice((0.5, 0.95, 1.0), num_slots),
        "min_p": rng.choice((0.0, 0.1), num_slots),
        "block_table": block_ids,
    }
    idle = {"is_finished": 1, "temperature": np.nan, "top_p": np.nan, "min_p": np.nan, "length": 7}
    values = {}
    for name, column in columns.items():
        value = getattr(table, name).clone()
        value[:num_slots] = torch.from_numpy(column).to(value)
        if name in idle:
            value[num_slots] = idle[name]
        values[name] = value
    return Columns(values)


class Steps:
    """One runner on the made-up sequences."""

    def __init__(self, runner: GpuRunner, hidden: HiddenStates, vocab_size: int) -> None:
        self._runner = runner
        self.hidden = dict(hidden.by_rows)  # of captured steps
        self._columns = made_up_columns(runner._table, vocab_size)
        generator = torch.Generator().manual_seed(1)
        self._pages = []
        for cache in runner._kv_caches:
            for pages in (cache.k, cache.v):
                values = torch.randn(pages.shape, generator=generator).to(pages)
                values[SCRATCH_BLOCK] = torch.nan
                self._pages.append((pages, values))

    @torch.inference_mode()
    def decode(self, slots: list[int]) -> tuple[BatchResult, list[Tensor]]:
        """One step from the same state every time; also the pages after it, scratch left out."""
        self._columns.write_to(self._runner._table)
        for pages, values in self._pages:
            pages.copy_(values)
        self._runner._plan.partial_out.fill_(torch.nan)
        self._runner._plan.partial_stats.fill_(torch.nan)
        batch = DecodeBatch(
            block_table_update=NO_UPDATE, slots=np.array(slots, dtype=np.int32), num_steps=1
        )
        result = self._runner.launch(batch).result()
        return result, [pages[SCRATCH_BLOCK + 1 :] for pages, _ in self._pages]


def check_every_batch_size(max_num_seqs: int, dtype: str) -> None:
    sizes = model_config()
    config = EngineConfig(
        device="cuda",
        dtype=dtype,  # type: ignore[arg-type]
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=max_num_seqs,
        block_size=BLOCK_SIZE,
        kv_cache_bytes=1 << 30,
        max_window_steps=2,
    )
    model = random_model(sizes, config)
    model.embed_tokens.weight[0] = torch.nan
    hidden = HiddenStates(model)
    captured = Steps(GpuRunner(model, resolve(config, sizes)), hidden, sizes.vocab_size)
    eager_config = replace(config, enforce_eager=True)
    eager = Steps(GpuRunner(model, resolve(eager_config, sizes)), hidden, sizes.vocab_size)
    rng = np.random.default_rng(2)
    num_tokens_drawn = set()
    for num_seqs in range(1, max_num_seqs + 1):
        slots = rng.permutation(max_num_seqs)[:num_seqs].tolist()
        ours, our_pages = captured.decode(slots)
        theirs, their_pages = eager.decode(slots)
        where = f"{num_seqs} of {max_num_seqs}"
        for name in ("token_ids", "num_tokens", "is_stopped", "is_nan"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), (name, where)
        assert ours.num_tokens.tolist() == [1] * num_seqs, where
        assert not ours.is_nan.any(), where
        size = next(size for size in graph_batch_sizes(max_num_seqs) if size >= num_seqs)
        graph_rows, eager_rows = captured.hidden[size], hidden.by_rows[size]
        assert graph_rows.data_ptr() != eager_rows.data_ptr()
        assert torch.equal(graph_rows[:num_seqs], eager_rows[:num_seqs]), where
        assert graph_rows[num_seqs:].isnan().all(), "the poison does not reach the padding"
        for ours_after, theirs_after in zip(our_pages, their_pages, strict=True):
            assert torch.equal(ours_after, theirs_after), where
        num_tokens_drawn.update(ours.token_ids.flatten().tolist())
    assert len(num_tokens_drawn) > min(max_num_seqs, 40) // 2


@pytest.mark.gpu
@pytest.mark.parametrize("max_num_seqs", [1, 3, 4, 7, 8, 15, 16, 17, 20, 100, 255, 256, 257, 512])
def test_a_captured_step_has_the_bits_of_an_eager_one(max_num_seqs: int) -> None:
    check_every_batch_size(max_num_seqs, "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_captured_step_has_the_bits_of_an_eager_one_in_other_dtypes(dtype: str) -> None:
    check_every_batch_size(20, dtype)


@pytest.mark.parametrize("max_num_seqs", [*range(1, 300), 512, 1000, 1024, 4096])
def test_the_captured_sizes_end_at_the_maximum(max_num_seqs: int) -> None:
    sizes = graph_batch_sizes(max_num_seqs)
    assert sizes[0] == 1
    assert sizes[-1] == max_num_seqs
    assert sizes == sorted(set(sizes))
