"""prefill_attention against its reference: ragged sequences, cached prefixes, chunks, NaN tails."""

import pytest
import torch
from torch import Tensor

from nanovllm_cli.kernels.prefill_attention import prefill_attention, prefill_attention_reference

from .triton_tests import DEVICE, DTYPES, HAS_GPU

MAX_ERROR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
GARBAGE = 2**30  # a block id that no memory backs


class Batch:
    """Random inputs; NaN in every place of the caches, tables and outputs that is not context."""

    def __init__(
        self,
        lens: list[tuple[int, int]],  # (cached tokens, new tokens) of each sequence
        dtype: torch.dtype = torch.float16,
        group: int = 2,
        num_kv_heads: int = 2,
        head_dim: int = 64,
        block_size: int = 64,
    ) -> None:
        if dtype == torch.bfloat16 and not HAS_GPU:
            pytest.skip("the interpreter multiplies the bits of bfloat16 as integers")
        counts = [-(-(cached + new) // block_size) for cached, new in lens]
        num_blocks = sum(counts) + 3
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        self.k_cache = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
        self.v_cache = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
        num_slots = len(lens) + 3
        self.slots = torch.randperm(num_slots, device=DEVICE)[: len(lens)].int()
        self.block_tables = torch.full((num_slots, max(counts) + 2), GARBAGE, device=DEVICE).int()
        free = torch.randperm(num_blocks).tolist()
        for slot, (cached, new), count in zip(self.slots.tolist(), lens, counts, strict=True):
            blocks = [free.pop() for _ in range(count)]
            self.block_tables[slot, :count] = torch.tensor(blocks, device=DEVICE).int()
            for i, block in enumerate(blocks):
                live = min(cached + new - i * block_size, block_size)
                for cache in (self.k_cache, self.v_cache):
                    values = torch.randn(num_kv_heads, live, head_dim, device=DEVICE)
                    cache[block, :, :live] = values.to(dtype)
        new = [n for _, n in lens]
        self.max_query_len = max(new)
        self.cu_seqlens_q = torch.tensor([0, *new]).cumsum(0).int().to(DEVICE)
        self.start_positions = torch.tensor([c for c, _ in lens]).int().to(DEVICE)
        self.q = torch.randn(sum(new), group * num_kv_heads, head_dim, device=DEVICE).to(dtype)

    def run(self, function: object = prefill_attention, **kwargs: object) -> Tensor:
        return function(
            self.q,
            self.k_cache,
            self.v_cache,
            self.block_tables,
            self.slots,
            self.cu_seqlens_q,
            self.start_positions,
            **kwargs,
        )

    def check(self) -> Tensor:
        out = self.run(max_query_len=self.max_query_len)
        expected = self.run(prefill_attention_reference).double()
        error = (out.double() - expected).norm() / expected.norm()
        assert error < MAX_ERROR[self.q.dtype], error
        return out


RAGGED = [(0, 5), (0, 123), (64, 1), (37, 70), (0, 64), (130, 65), (1, 1), (3, 0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_ragged_sequences_with_cached_prefixes(dtype: torch.dtype, head_dim: int) -> None:
    Batch(RAGGED, dtype, head_dim=head_dim).check()


@pytest.mark.parametrize("block_size", [16, 32, 128, 256])
def test_block_sizes(block_size: int) -> None:
    Batch([(0, 123), (37, 70), (200, 5)], block_size=block_size).check()


@pytest.mark.parametrize(("group", "num_kv_heads"), [(1, 3), (4, 1), (5, 2), (8, 1), (3, 1)])
def test_groups_of_query_heads(group: int, num_kv_heads: int) -> None:
    Batch([(0, 61), (37, 30)], group=group, num_kv_heads=num_kv_heads).check()


def test_a_chunked_prompt_gives_the_bits_of_a_whole_one() -> None:
    batch = Batch([(0, 150)])
    whole = batch.check()
    parts = []
    q = batch.q
    for begin, end in ((0, 70), (70, 71), (71, 150)):
        batch.q = q[begin:end]
        batch.cu_seqlens_q = torch.tensor([0, end - begin], device=DEVICE).int()
        batch.start_positions = torch.tensor([begin], device=DEVICE).int()
        parts.append(batch.run(max_query_len=end - begin))
    assert torch.equal(torch.cat(parts), whole)


def test_strided_queries_and_no_tokens() -> None:
    batch = Batch([(0, 20)])
    wide = torch.full((20, 9, 64), torch.nan, dtype=batch.q.dtype, device=DEVICE)
    wide[:, 2:6] = batch.q
    batch.q = wide[:, 2:6]
    batch.check()
    batch.q, batch.cu_seqlens_q = wide[:0, 2:6], torch.zeros(2, device=DEVICE).int()
    assert batch.run(max_query_len=0).shape == (0, 4, 64)


@pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("group", "num_kv_heads"), [(2, 8), (4, 8), (8, 8), (5, 8)])
def test_long_sequences(group: int, num_kv_heads: int, dtype: torch.dtype) -> None:
    lens = [(0, 2048), (0, 513), (4096, 300), (1638, 410), (100, 1), (0, 3000)]
    Batch(lens, dtype, group=group, num_kv_heads=num_kv_heads, head_dim=128).check()
