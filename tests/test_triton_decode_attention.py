"""decode_attention against its reference; in Triton's interpreter where there is no GPU."""

import random
import zlib

import pytest
import torch

from nanovllm_cli.kernels.decode_attention import (
    BLOCK_N,
    DecodePlan,
    decode_attention,
    decode_attention_reference,
    plan_decode_attention,
    split_budget,
)

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
MAX_ERROR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
# Multiprocessors to spread over: too few for any split, a few more, enough to split all.
NUM_SMS = [1, 24, 60]
GARBAGE = 2**30  # a block id that no memory backs
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")


class Batch:
    """Random inputs; NaN in every place of the caches, tables and outputs that is not context."""

    def __init__(
        self,
        context_lens: list[int],
        dtype: torch.dtype = torch.float16,
        group: int = 2,
        num_kv_heads: int = 2,
        head_dim: int = 64,
        block_size: int = 64,
        num_sms: int = 12,
    ) -> None:
        if dtype == torch.bfloat16 and not HAS_GPU:
            pytest.skip("the interpreter multiplies the bits of bfloat16 as integers")
        self.num_seqs = len(context_lens)
        counts = [-(-length // block_size) for length in context_lens]
        num_blocks = sum(counts) + 3
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        self.k_cache = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
        self.v_cache = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
        max_num_seqs = self.num_seqs + 3
        self.slots = torch.randperm(max_num_seqs, device=DEVICE)[: self.num_seqs].int()
        self.context_lens = torch.full((max_num_seqs,), 12345, dtype=torch.int32, device=DEVICE)
        self.block_tables = torch.full(
            (max_num_seqs, max(counts) + 2), GARBAGE, dtype=torch.int32, device=DEVICE
        )
        free = torch.randperm(num_blocks).tolist()
        for slot, length, count in zip(self.slots.tolist(), context_lens, counts, strict=True):
            blocks = [free.pop() for _ in range(count)]
            self.context_lens[slot] = length
            self.block_tables[slot, :count] = torch.tensor(blocks, dtype=torch.int32)
            for i, block in enumerate(blocks):
                live = min(length - i * block_size, block_size)
                for cache in (self.k_cache, self.v_cache):
                    values = torch.randn(num_kv_heads, live, head_dim, device=DEVICE)
                    cache[block, :, :live] = values.to(dtype)
        num_heads = group * num_kv_heads
        self.q = torch.randn(self.num_seqs, num_heads, head_dim, device=DEVICE).to(dtype)
        self.plan = DecodePlan.allocate(
            max_num_seqs=max_num_seqs,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            device=DEVICE,
            block_size=block_size,
            num_sms=num_sms,
        )
        self.plan.partial_out.fill_(torch.nan)
        self.plan.partial_stats.fill_(torch.nan)
        self.out = torch.full_like(self.q, torch.nan)

    def make_plan(self) -> None:
        plan_decode_attention(self.plan, self.context_lens, self.slots, self.block_tables)

    def attend(self) -> torch.Tensor:
        return decode_attention(
            self.q, self.k_cache, self.v_cache, self.block_tables, self.plan, self.out
        )

    def reference(self) -> torch.Tensor:
        return decode_attention_reference(
            self.q, self.k_cache, self.v_cache, self.block_tables, self.context_lens, self.slots
        )

    def check(self) -> None:
        expected = self.reference().float()
        error = (self.out.float() - expected).norm() / expected.norm()
        assert error < MAX_ERROR[self.q.dtype], f"relative error {error}"
        is_empty = self.context_lens[self.slots] == 0
        assert torch.equal(self.out[is_empty], torch.zeros_like(self.out[is_empty]))
        assert not self.plan.arrivals.any(), "arrivals are not as the next launch wants them"


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.name.encode()))
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("dtype", list(MAX_ERROR), ids=lambda dtype: str(dtype)[6:])
def test_every_group_and_dtype_matches_the_reference(
    dtype: torch.dtype, group: int, head_dim: int
) -> None:
    batch = Batch([123, 0, 1, 200], dtype, group, 1, head_dim)
    batch.make_plan()
    batch.attend()
    batch.check()


@pytest.mark.parametrize("num_sms", NUM_SMS)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
def test_every_block_size_and_split_matches_the_reference(block_size: int, num_sms: int) -> None:
    edges = [0, 1, block_size - 1, block_size, block_size + 1]
    batch = Batch([*edges, 130, 0, 333], block_size=block_size, num_sms=num_sms)
    batch.make_plan()
    batch.attend()
    batch.check()


@needs_gpu
@pytest.mark.parametrize("num_sms", [1, 132])
@pytest.mark.parametrize("dtype", list(MAX_ERROR), ids=lambda dtype: str(dtype)[6:])
def test_long_contexts_match_the_reference(dtype: torch.dtype, num_sms: int) -> None:
    batch = Batch([40_000, 1, 2049, 0, 9999], dtype, num_kv_heads=8, num_sms=num_sms)
    batch.make_plan()
    batch.attend()
    batch.check()


@needs_gpu
@pytest.mark.parametrize("group", [1, 2, 4, 5, 8])
def test_a_large_ragged_batch_matches_the_reference(group: int) -> None:
    lens = [random.Random(group).randrange(1500) for _ in range(300)]
    batch = Batch(lens, torch.bfloat16, group, 8, 128, num_sms=132)
    batch.make_plan()
    batch.attend()
    batch.check()


def test_a_batch_of_empty_rows_gives_zeros() -> None:
    batch = Batch([0, 0, 0])
    batch.make_plan()
    assert torch.equal(batch.attend(), torch.zeros_like(batch.q))


def test_rows_may_share_a_slot() -> None:
    batch = Batch([70, 130, 200])
    batch.slots[1] = batch.slots[2]
    batch.make_plan()
    batch.attend()
    batch.check()


def test_the_rows_of_q_may_be_strided() -> None:
    batch = Batch([70, 130, 0, 5])
    num_heads = batch.q.shape[1]
    fused = torch.full((4, num_heads + 4, 64), torch.nan, dtype=batch.q.dtype, device=DEVICE)
    fused[:, :num_heads] = batch.q
    batch.q = fused[:, :num_heads]
    batch.make_plan()
    batch.attend()
    batch.check()


def test_the_same_inputs_give_the_same_bits() -> None:
    batch = Batch([300, 3, 400, 64], num_sms=24)
    batch.make_plan()
    first = batch.attend().clone()
    for _ in range(50 if HAS_GPU else 2):
        batch.out.fill_(torch.nan)
        assert torch.equal(batch.attend(), first)


def test_one_plan_serves_batches_of_every_size() -> None:
    batch = Batch([100, 0, 300, 65, 64, 1])
    slots = batch.slots.clone()
    for num_seqs in (6, 1, 3, 6):
        batch.slots = slots[:num_seqs].contiguous()
        batch.q, batch.out = batch.q[:num_seqs], batch.out[:num_seqs]
        batch.make_plan()
        batch.attend()
        batch.check()
        batch.q = torch.randn(6, *batch.q.shape[1:], device=DEVICE).to(batch.q.dtype)
        batch.out = torch.full_like(batch.q, torch.nan)


@pytest.mark.parametrize("seed", range(20))
def test_items_cover_each_context_once_longest_first(seed: int) -> None:
    rng = random.Random(seed)
    num_sms = rng.choice([1, 8, 100, 400])
    lens = [rng.choice([0, 1, 64, 65, rng.randrange(300), rng.randrange(3000)]) for _ in range(9)]
    batch = Batch(lens, num_kv_heads=2, head_dim=64, num_sms=num_sms)
    batch.make_plan()
    items = batch.plan.items[: int(batch.plan.num_items)].tolist()
    assert len(items) <= len(lens) + split_budget(len(lens), 2, num_sms)
    slots = batch.slots.tolist()
    sizes = []
    for row, length in enumerate(lens):
        mine = [i for i, item in enumerate(items) if item[0] == row]
        assert mine == list(range(mine[0], mine[0] + len(mine)))
        position = 0
        for i in mine:
            _, slot, begin, end, first_item, num_splits, first_block, _ = items[i]
            assert (slot, first_item, num_splits) == (slots[row], mine[0], len(mine))
            assert begin == position
            assert begin % BLOCK_N == 0
            if length:
                assert end > begin
                assert first_block == int(batch.block_tables[slot, begin // 64])
            position = end
        assert position == length
        sizes.append((mine[0], -(-items[mine[0]][3] // BLOCK_N)))
    tiles = [max(size, 1) for _, size in sorted(sizes)]
    assert tiles == sorted(tiles, reverse=True)


@needs_gpu
def test_a_graph_replays_with_other_context_lens() -> None:
    batch = Batch([1500, 1500, 1500, 1500, 1500], torch.bfloat16, 2, 8, 128, num_sms=132)
    batch.make_plan()
    batch.attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch.make_plan()
        batch.attend()
    for lens in ([1500, 1, 700, 0, 64], [0, 0, 0, 0, 0], [1, 2, 3, 4, 5], [1500] * 5):
        batch.context_lens[batch.slots.long()] = torch.tensor(lens, device=DEVICE).int()
        batch.out.fill_(torch.nan)
        graph.replay()
        if any(lens):
            batch.check()
        else:
            assert not batch.out.any()


@needs_gpu
def test_offsets_beyond_int32_are_reached() -> None:
    num_blocks = 2**31 // (8 * 64 * 128) + 8
    batch = Batch([64 * 4], torch.bfloat16, 2, 8, 128)
    blocks = torch.tensor([num_blocks - 1, 0, num_blocks // 2, num_blocks - 2], device=DEVICE)
    old = batch.block_tables[batch.slots.long(), :4].flatten().long()
    for name in ("k_cache", "v_cache"):
        large = torch.empty(num_blocks, 8, 64, 128, dtype=torch.bfloat16, device=DEVICE)
        large[blocks] = getattr(batch, name)[old]
        setattr(batch, name, large)
    batch.block_tables[batch.slots.long(), :4] = blocks.int()
    batch.make_plan()
    batch.attend()
    batch.check()
