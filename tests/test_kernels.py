"""The kernels' plain PyTorch references: right, and the same bits in any company.

The references are what the CPU runs and what a GPU kernel will be held against, so they are
checked here against formulas of PyTorch's own.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm_cli.kernels.kv_store import kv_store_reference
from nanovllm_cli.kernels.linear import ROWS_PER_TILE, linear_reference
from nanovllm_cli.kernels.paged_attention import QueryTiles, paged_attention_reference
from nanovllm_cli.kernels.rms_norm import rms_norm_reference
from nanovllm_cli.kernels.rotary import rotary_reference
from nanovllm_cli.kernels.swiglu import swiglu_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within the dtype's tolerance, relative to the largest value: one tolerance a dtype."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max()
    limit = TOLERANCE[actual.dtype] * max(expected.abs().max().item(), 1.0)
    assert error <= limit, f"{error} > {limit}"


def assert_rows_do_not_care_for_their_company(
    function: Callable[[Tensor], Tensor], x: Tensor, generator: torch.Generator
) -> None:
    """Each row alone, in any order and in any part of the batch: the same bits."""
    expected = function(x)
    alone = torch.cat([function(x[i : i + 1]) for i in range(len(x))])
    assert torch.equal(alone, expected)
    order = torch.randperm(len(x), generator=generator)
    assert torch.equal(function(x[order]), expected[order])
    for start, end in ((0, len(x) // 2), (1, len(x)), (len(x) // 3, len(x) - 1)):
        if start < end:
            assert torch.equal(function(x[start:end]), expected[start:end])


# linear


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_rows", "in_features", "out_features"),
    [(1, 1, 1), (5, 123, 7), (15, 64, 160), (16, 96, 64), (17, 33, 130), (40, 192, 512)],
)
def test_linear_is_the_product_with_the_transposed_weight(
    num_rows: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    x = torch.randn(num_rows, in_features, generator=generator).to(dtype)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    actual = linear_reference(x, weight)
    assert actual.dtype == dtype
    assert_close(actual, (x.double() @ weight.double().t()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_rows", "in_features", "out_features"),
    # MKL, on a CPU that is not Intel's, looks at a row's place where fewer than 9 columns of an odd
    # width are made. No model has such.
    [(5, 123, 21), (16, 64, 160), (33, 96, 64), (50, 1, 3), (70, 192, 1088), (37, 1024, 48),
     (40, 300, 999)],
)  # fmt: skip
def test_a_row_of_linear_has_the_same_bits_in_any_batch(
    num_rows: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    x = torch.randn(num_rows, in_features, generator=generator).to(dtype)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    assert_rows_do_not_care_for_their_company(
        lambda rows: linear_reference(rows, weight), x, generator
    )


def test_a_row_of_linear_does_not_notice_nan_in_its_tile(generator: torch.Generator) -> None:
    x = torch.randn(ROWS_PER_TILE, 64, generator=generator)
    weight = torch.randn(48, 64, generator=generator)
    expected = linear_reference(x, weight)
    x[3] = torch.nan
    x[9, 5] = torch.inf
    actual = linear_reference(x, weight)
    clean = [i for i in range(len(x)) if i not in (3, 9)]
    assert torch.equal(actual[clean], expected[clean])
    assert actual[3].isnan().all()


def test_linear_of_no_rows_is_no_rows() -> None:
    assert linear_reference(torch.empty(0, 8), torch.empty(5, 8)).shape == (0, 5)


# RMSNorm, rotary, SwiGLU


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (7, 64), (3, 4, 128), (2, 5, 33)])
def test_rms_norm_divides_by_the_root_of_the_mean_square(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    before = x.clone()
    actual = rms_norm_reference(x, weight, 1e-6)
    wide = x.double()
    root = (wide.pow(2).sum(-1, keepdim=True) / shape[-1] + 1e-6).sqrt()
    assert actual.dtype == dtype
    assert_close(actual, wide / root * weight.double())
    assert torch.equal(x, before), "the input was changed in place"


def test_rms_norm_keeps_small_numbers_from_dividing_by_zero() -> None:
    x = torch.zeros(2, 8)
    assert torch.equal(rms_norm_reference(x, torch.ones(8), 1e-6), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 64, 123, 128, 192, 1024, 5120])
def test_a_row_of_rms_norm_has_the_same_bits_in_any_batch(
    size: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = torch.randn(37, size, generator=generator).to(dtype)
    weight = torch.randn(size, generator=generator).to(dtype)
    assert_rows_do_not_care_for_their_company(
        lambda rows: rms_norm_reference(rows, weight, 1e-6), x, generator
    )


def test_a_head_of_rms_norm_has_the_same_bits_as_a_slice_of_wider_rows(
    generator: torch.Generator,
) -> None:
    heads = torch.randn(9, 8, 64, generator=generator)
    weight = torch.randn(64, generator=generator)
    whole = rms_norm_reference(heads, weight, 1e-6)
    parts = [rms_norm_reference(part, weight, 1e-6) for part in heads.split((4, 2, 2), dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "head_dim"), [(1, 1, 2), (5, 3, 122), (9, 4, 128)]
)
def test_rotary_turns_each_pair_of_halves_by_its_angle(
    num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = torch.randn(num_tokens, num_heads, head_dim, generator=generator).to(dtype)
    angles = torch.rand(num_tokens, head_dim // 2, generator=generator) * 100
    cos, sin = angles.cos(), angles.sin()
    actual = rotary_reference(x, cos, sin)
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(
        torch.ones(angles.shape, dtype=torch.float64), angles.double()
    ).unsqueeze(1)
    assert actual.dtype == dtype
    assert_close(actual, torch.cat((turned.real, turned.imag), dim=-1))


def test_rotary_at_position_zero_changes_nothing(generator: torch.Generator) -> None:
    x = torch.randn(3, 2, 64, generator=generator)
    assert torch.equal(rotary_reference(x, torch.ones(3, 32), torch.zeros(3, 32)), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_rotary_has_the_same_bits_in_any_batch(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    angles = torch.rand(37, 61, generator=generator) * 100
    x = torch.randn(37, 5, 122, generator=generator).to(dtype)
    packed = torch.cat((angles, x.flatten(1).float()), dim=1)

    def rotate(rows: Tensor) -> Tensor:
        angles, x = rows[:, :61], rows[:, 61:].view(len(rows), 5, 122).to(dtype)
        return rotary_reference(x, angles.cos(), angles.sin())

    assert_rows_do_not_care_for_their_company(rotate, packed, generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 1), (5, 123), (17, 96)])
def test_swiglu_is_silu_of_the_gate_times_up(
    num_tokens: int, size: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    gate_up = (torch.randn(num_tokens, 2 * size, generator=generator) * 4).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    actual = swiglu_reference(gate_up)
    assert actual.dtype == dtype
    assert_close(actual, F.silu(gate) * up)


def test_swiglu_of_large_gates_is_finite() -> None:
    gate_up = torch.tensor([[-1000.0, 1000.0, -88.0, 0.0, 2.0, 3.0, 4.0, 5.0]])
    assert swiglu_reference(gate_up)[0].tolist() == pytest.approx(
        [0.0, 3000.0, 0.0, 0.0], abs=1e-30
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 96, 123, 512, 3072])
def test_a_row_of_swiglu_has_the_same_bits_in_any_batch(
    size: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    gate_up = (torch.randn(37, 2 * size, generator=generator) * 4).to(dtype)
    assert_rows_do_not_care_for_their_company(swiglu_reference, gate_up, generator)


def test_an_element_has_the_same_bits_wherever_it_lies() -> None:
    # Vectorized loops may treat the last few elements of a share differently.
    for size in (1, 3, 15, 16, 17, 31, 33, 1023, 40001):
        gate_up = torch.full((3, 2 * size), -1.2345678)
        assert len(swiglu_reference(gate_up).unique()) == 1
    for num_heads in (1, 3, 7, 700):
        x = torch.full((3, num_heads, 10), 0.7654321)
        angles = torch.full((3, 5), 1.2345678)
        turned = rotary_reference(x, angles.cos(), angles.sin())
        assert len(turned[..., :5].unique()) == len(turned[..., 5:].unique()) == 1


# KV store


def test_kv_store_writes_each_row_to_its_place_and_nothing_else(
    generator: torch.Generator,
) -> None:
    shape = (7, 3, 5, 11)  # blocks, heads, block size, head dim
    k_cache, v_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    slot_mapping = torch.tensor([6, 34, 12, 20, 7])
    k = torch.randn(5, 3, 11, generator=generator)
    v = torch.randn(5, 3, 11, generator=generator)
    kv_store_reference(k, v, k_cache, v_cache, slot_mapping)
    for cache, rows in ((k_cache, k), (v_cache, v)):
        by_position = cache.transpose(1, 2).reshape(35, 3, 11)
        assert torch.equal(by_position[slot_mapping], rows)
        untouched = [i for i in range(35) if i not in slot_mapping.tolist()]
        assert by_position[untouched].isnan().all()


def test_kv_store_lets_padding_rows_share_the_scratch_block() -> None:
    k_cache, v_cache = torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 4, 8)
    rows = torch.ones(3, 1, 8)
    kv_store_reference(rows, rows, k_cache, v_cache, torch.tensor([0, 0, 5]))
    assert torch.equal(k_cache[1, 0, 1], torch.ones(8))
    assert not k_cache[1, 0, [0, 2, 3]].any()


# Paged attention


Lens = list[tuple[int, int]]  # (start position, tokens) of each sequence


class Paged:
    """Random sequences in random pages; all that no one may read is NaN."""

    def __init__(
        self,
        lens: Lens,
        *,
        group_size: int = 2,
        num_kv_heads: int = 2,
        head_dim: int = 64,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        self.group_size, self.block_size, self.lens = group_size, block_size, lens
        num_blocks = [-(-(start + n) // block_size) for start, n in lens]
        ids = iter((rng.permutation(sum(num_blocks) + 5) + 1).tolist())
        shape = (sum(num_blocks) + 6, num_kv_heads, block_size, head_dim)
        self.k_cache = torch.full(shape, torch.nan, dtype=dtype)
        self.v_cache = torch.full(shape, torch.nan, dtype=dtype)
        # Padding points to the scratch block, which is as bad as any other.
        self.block_tables = torch.zeros(len(lens), max(num_blocks) + 2, dtype=torch.int64)
        self.keys, self.values, self.queries = [], [], []
        for i, (start, num_tokens) in enumerate(lens):
            table = [next(ids) for _ in range(num_blocks[i])]
            self.block_tables[i, : len(table)] = torch.tensor(table)
            positions = torch.arange(start + num_tokens)
            slots = self.block_tables[i, positions // block_size] * block_size
            k, v = (
                torch.randn(start + num_tokens, num_kv_heads, head_dim, generator=generator)
                for _ in range(2)
            )
            kv_store_reference(
                k.to(dtype), v.to(dtype), self.k_cache, self.v_cache, slots + positions % block_size
            )
            self.keys.append(k.to(dtype))
            self.values.append(v.to(dtype))
            q = torch.randn(num_tokens, num_kv_heads * group_size, head_dim, generator=generator)
            self.queries.append(q.to(dtype))

    def attend(
        self, sequences: list[int] | None = None, *, is_finite: bool = False
    ) -> list[Tensor]:
        """The packed attention of some sequences, taken apart again."""
        chosen = list(range(len(self.lens))) if sequences is None else sequences
        parts = [(i, *self.lens[i], self.queries[i]) for i in chosen]
        return self.attend_at(parts, is_finite=is_finite)

    def attend_at(
        self, parts: list[tuple[int, int, int, Tensor]], *, is_finite: bool = False
    ) -> list[Tensor]:
        """Of (sequence, start position, tokens, queries)."""
        query_lens = np.array([n for _, _, n, _ in parts], dtype=np.int32)
        tiles = QueryTiles.of(
            query_lens,
            np.array([start for _, start, _, _ in parts], dtype=np.int32),
            group_size=self.group_size,
            block_size=self.block_size,
        )
        out = paged_attention_reference(
            torch.cat([q for _, _, _, q in parts]),
            self.k_cache,
            self.v_cache,
            self.block_tables[[i for i, _, _, _ in parts]],
            tiles,
            is_finite=is_finite,
        )
        return list(out.split(query_lens.tolist()))

    def expected(self, i: int) -> Tensor:
        start, num_tokens = self.lens[i]
        k, v = (
            rows.double().repeat_interleave(self.group_size, dim=1).transpose(0, 1)
            for rows in (self.keys[i], self.values[i])
        )
        is_past = (
            torch.arange(start + num_tokens) <= torch.arange(start, start + num_tokens)[:, None]
        )
        out = F.scaled_dot_product_attention(
            self.queries[i].double().transpose(0, 1), k, v, attn_mask=is_past
        )
        return out.transpose(0, 1)


RAGGED: Lens = [(0, 1), (0, 37), (5, 1), (63, 1), (15, 18), (16, 16), (100, 29), (47, 2)]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group_size", [1, 2, 4, 5, 8])
def test_paged_attention_is_attention_over_each_tokens_own_past(
    group_size: int, head_dim: int
) -> None:
    paged = Paged(RAGGED, group_size=group_size, head_dim=head_dim)
    for i, actual in enumerate(paged.attend()):
        assert_close(actual, paged.expected(i))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [16, 32, 64, 256])
def test_paged_attention_takes_every_block_size_and_dtype(
    block_size: int, dtype: torch.dtype
) -> None:
    paged = Paged(RAGGED, block_size=block_size, dtype=dtype)
    for i, actual in enumerate(paged.attend()):
        assert actual.dtype == dtype
        assert_close(actual, paged.expected(i))


@pytest.mark.parametrize("seed", range(5))
def test_paged_attention_of_random_ragged_batches(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    lens: Lens = [(int(rng.integers(0, 70)), int(rng.integers(1, 50))) for _ in range(20)]
    lens += [(int(rng.integers(0, 150)), 1) for _ in range(300)]  # more tiles than go at once
    paged = Paged(lens, group_size=4, num_kv_heads=1, seed=seed)
    for i, actual in enumerate(paged.attend()):
        assert_close(actual, paged.expected(i))


def test_scores_far_apart_do_not_overflow() -> None:
    paged = Paged([(0, 40)])
    paged.queries = [paged.queries[0] * 1000]
    (actual,) = paged.attend()
    assert actual.isfinite().all()
    assert_close(actual, paged.expected(0))


@pytest.mark.parametrize("group_size", [1, 2, 5, 8])
def test_a_sequence_attends_with_the_same_bits_alone_and_in_any_batch(group_size: int) -> None:
    paged = Paged(RAGGED, group_size=group_size)
    together = paged.attend()
    for i, expected in enumerate(together):
        assert torch.equal(paged.attend([i])[0], expected)
    backwards = paged.attend(list(range(len(RAGGED)))[::-1])
    for actual, expected in zip(backwards[::-1], together, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("group_size", [1, 2, 4, 5, 8])
def test_a_prefill_its_chunks_and_its_decode_steps_have_the_same_bits(
    group_size: int, num_kv_heads: int
) -> None:
    paged = Paged([(0, 75)], group_size=group_size, num_kv_heads=num_kv_heads)
    (whole,) = paged.attend()
    (q,) = paged.queries
    decoded = torch.cat([paged.attend_at([(0, p, 1, q[p : p + 1])])[0] for p in range(75)])
    assert torch.equal(decoded, whole)
    all_at_once = paged.attend_at([(0, p, 1, q[p : p + 1]) for p in range(75)])
    assert torch.equal(torch.cat(all_at_once), whole)
    for sizes in ((17,) * 4 + (7,), (1, 74), (16, 3, 56), (50, 25)):
        starts = np.cumsum((0, *sizes[:-1])).tolist()
        chunks = [
            paged.attend_at([(0, start, n, q[start : start + n])])[0]
            for start, n in zip(starts, sizes, strict=True)
        ]
        assert torch.equal(torch.cat(chunks), whole)


@pytest.mark.parametrize("group_size", [1, 2, 4, 5])
def test_a_bad_token_harms_no_block_before_its_own(group_size: int) -> None:
    # A full block can be found by others whose tokens are the same up to its end, and no further.
    paged = Paged([(0, 40)], group_size=group_size)
    (clean,) = paged.attend()
    (q,) = paged.queries
    block_id = paged.block_tables[0, 1]
    paged.v_cache[block_id, :, 1] = torch.nan  # position 17
    for start in range(16):
        (actual,) = paged.attend_at([(0, start, 40 - start, q[start:])])
        assert torch.equal(actual[: 16 - start], clean[start:16]), f"a chunk from {start} on"


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 5, 8, 16])
def test_query_tiles_hold_every_token_once_at_its_position(group_size: int) -> None:
    query_lens, starts = [1, 17, 8, 3], [40, 5, 0, 15]
    tiles = QueryTiles.of(
        np.array(query_lens, dtype=np.int32),
        np.array(starts, dtype=np.int32),
        group_size=group_size,
        block_size=16,
    )
    num_tokens = sum(query_lens)
    tokens = tiles.token_indices.flatten()[tiles.places]
    assert torch.equal(tokens, torch.arange(num_tokens))
    tile_of_token = tiles.places.numpy() // tiles.token_indices.shape[1]
    owners = tiles.sequence_indices.numpy()[tile_of_token]
    assert np.array_equal(owners, np.repeat(np.arange(4), query_lens))
    num_visible = (tiles.masks[:, 0, ::group_size] == 0).sum(dim=-1).flatten()[tiles.places].numpy()
    positions = (tiles.num_blocks[tile_of_token] - 1) * 16 + num_visible - 1
    expected = [np.arange(start, start + n) for start, n in zip(starts, query_lens, strict=True)]
    assert np.array_equal(positions, np.concatenate(expected))


@pytest.mark.parametrize("seed", range(3))
def test_knowing_that_the_pages_are_finite_changes_no_bit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lens: Lens = [(int(rng.integers(0, 150)), int(rng.integers(1, 50))) for _ in range(40)]
    paged = Paged(lens, seed=seed)
    expected = paged.attend()
    paged.k_cache.nan_to_num_(nan=7.0)
    paged.v_cache.nan_to_num_(nan=-9.0)
    for actual, other in zip(paged.attend(is_finite=True), expected, strict=True):
        assert torch.equal(actual, other)
