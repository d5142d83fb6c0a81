"""The sampling kernels against the engine's sampler and its reference."""

import pytest
import torch
from torch import Tensor

from nanovllm_cli.core.sampler import sample as sample_on_cpu
from nanovllm_cli.kernels.fused_sampling import sample
from nanovllm_cli.kernels.sampling import _filter, gumbel_noise_reference

from .triton_tests import DEVICE, DTYPES, HAS_GPU, randn

VOCAB_SIZES = [1, 123, 5000] + ([151936] if HAS_GPU else [])


class Table:
    """Slot columns in a random order: row i of the batch lies in slot slots[i]."""

    def __init__(self, num_rows: int, vocab_size: int, **columns: object) -> None:
        self.vocab_size = vocab_size
        num_slots = num_rows + 2
        self.slots = torch.randperm(num_slots)[:num_rows].int()
        zeros = torch.zeros(num_slots)
        self.temperature = zeros + 1
        self.top_k = zeros.int() + vocab_size
        self.top_p = zeros + 1
        self.min_p = zeros.clone()
        self.seed = torch.randint(-(2**63), 2**63 - 1, (num_slots,))
        self.length = torch.randint(1, 40000, (num_slots,)).int()
        self.min_length = zeros.int()
        self.stop_token_ids = torch.full((num_slots, 16), -1, dtype=torch.int32)
        for name, values in columns.items():
            column = getattr(self, name)
            column[self.slots.long()] = torch.as_tensor(values, dtype=column.dtype)

    def columns(self) -> dict[str, Tensor]:
        names = ("length", "min_length", "stop_token_ids", "seed")
        names += ("temperature", "top_k", "top_p", "min_p")
        return {name: getattr(self, name).to(DEVICE) for name in names}


def check(logits: Tensor, table: Table) -> Tensor:
    """Equal tokens, but where the two best differ by no more than rounding."""
    before = logits.clone()
    actual, actual_nan = sample(logits, table.slots.to(DEVICE), **table.columns())
    slots = table.slots.long()
    wide = type("Wide", (), {})()
    for name, column in vars(table).items():
        is_integer = isinstance(column, Tensor) and column.dtype == torch.int32
        setattr(wide, name, column.long() if is_integer else column)
    host = before.cpu()
    expected, expected_nan = sample_on_cpu(host, wide, slots)  # bans its stops in place
    assert torch.equal(actual_nan.cpu(), expected_nan)
    assert actual.dtype == torch.int32
    for row in torch.nonzero((actual.cpu() != expected) & ~expected_nan).flatten().tolist():
        slot = slots[row]
        temperature = table.temperature[slot]
        assert temperature >= 1e-5, f"greedy row {row}: {actual[row]}, not {expected[row]}"
        ids = torch.tensor([[int(actual[row]), int(expected[row])]])
        noise = gumbel_noise_reference(ids, table.seed[slot, None], table.length[slot, None].long())
        noisy = host[row].float()[ids] / temperature + noise
        gap = abs(float(noisy[0, 0] - noisy[0, 1]))
        assert gap < 1e-4, f"row {row}: {ids.tolist()} differ by {gap}"
    assert (actual[actual_nan] == 0).all()
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_greedy_takes_the_lowest_of_the_largest(vocab_size: int, dtype: torch.dtype) -> None:
    logits = randn(5, vocab_size, dtype=dtype).round()  # many ties
    check(logits, Table(5, vocab_size, temperature=[0, 1e-6, 0, 9e-6, 0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_a_draw_is_the_references(vocab_size: int, dtype: torch.dtype) -> None:
    num_rows = 24 if HAS_GPU else 20
    logits = randn(num_rows, vocab_size, dtype=dtype, scale=3)
    temperature = torch.tensor([0.6, 1.0, 1.7, 0.0]).repeat(num_rows // 4)
    check(logits, Table(num_rows, vocab_size, temperature=temperature))


def test_rows_without_finite_logits_are_reported() -> None:
    for columns in ({}, {"top_k": 5}, {"temperature": 0.0}):
        logits = randn(7, 5000)
        logits[1] = -torch.inf
        logits[2, 4999] = torch.nan
        logits[3, 17] = torch.inf
        logits[4, 100:] = -torch.inf
        logits[5, 0] = torch.nan
        check(logits, Table(7, 5000, **columns))


@pytest.mark.parametrize("columns", [{}, {"top_k": 3}, {"temperature": 0.0}, {"top_p": 0.5}])
def test_stop_tokens_are_banned_before_the_least_length(columns: dict[str, object]) -> None:
    logits = randn(6, 5000)
    stops = torch.full((6, 16), -1)
    stops[:, :3] = torch.tensor([4999, 7, 4500])
    logits[:, [4999, 7, 4500]] = torch.tensor([20.0, 19.0, 18.0], device=DEVICE)
    table = Table(6, 5000, stop_token_ids=stops, length=10, min_length=[11, 10, 0, 12, 9, 99])
    for name, value in columns.items():
        getattr(table, name).fill_(value)
    tokens = check(logits, table).tolist()
    is_stop = [token in (4999, 7, 4500) for token in tokens]
    assert is_stop == [False, True, True, False, True, False]


FILTERS = [
    {"top_k": 1},
    {"top_k": 20, "top_p": 0.95},
    {"top_k": 100},
    {"top_k": 1500, "top_p": 0.97},  # more than is listed: the whole row is read
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.1},
    {"top_k": 119, "top_p": 0.3, "temperature": 2.0},
    {"top_p": 0.99, "temperature": 0.7, "min_p": 0.001},
]


@pytest.mark.parametrize("kind", ["plain", "tied", "equal", "masked"])
def test_rows_of_every_kind_in_one_batch(kind: str) -> None:
    """Greedy, plain and filtered rows together; an odd vocabulary, seeds of 64 bits."""
    vocab_size = 4999
    rows: list[dict[str, float]] = [{}, {"temperature": 0.0}, {"temperature": 50.0}, *FILTERS]
    logits = randn(len(rows), vocab_size, dtype=torch.bfloat16, scale=3)
    if kind == "tied":
        logits = logits.round()
    elif kind == "equal":  # every token ties, -0 with 0: no list holds them
        logits[:], logits[:, ::2] = 0.0, -0.0
    elif kind == "masked":
        logits[:, torch.randperm(vocab_size)[:-17]] = -torch.inf
    table = Table(len(rows), vocab_size, seed=[2**63 - 1, -(2**63), *range(len(rows) - 2)])
    for slot, row in zip(table.slots.tolist(), rows, strict=True):
        for name, value in row.items():
            getattr(table, name)[slot] = value
    check(logits, table)


@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_a_flat_nucleus_is_drawn_from_as_a_peaked_one(scale: float) -> None:
    # 20001 tokens are 313 blocks: the first list has 128 of them at most, the next one all.
    top_p = [0.004, 0.05, 0.2, 0.9]
    check(randn(4, 20001, dtype=torch.bfloat16, scale=scale), Table(4, 20001, top_p=top_p))


@pytest.mark.long  # minutes in the interpreter; the batch above has every filter
@pytest.mark.parametrize("scale", [0.5, 4.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", FILTERS, ids=str)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES[1:])
def test_a_draw_from_filtered_tokens_is_the_references(
    vocab_size: int, columns: dict[str, float], dtype: torch.dtype, scale: float
) -> None:
    if not HAS_GPU and (dtype == torch.float16 or scale == 0.5 or vocab_size == 5000):
        pytest.skip("the interpreter is slow")
    if vocab_size == 151936 and (dtype == torch.float16 or (dtype, scale) == (torch.float32, 4.0)):
        pytest.skip("the reference is slow")
    num_rows = 8 if HAS_GPU else 3
    columns = {**columns, "top_k": min(columns.get("top_k", vocab_size), vocab_size)}
    check(
        randn(num_rows, vocab_size, dtype=dtype, scale=scale),
        Table(num_rows, vocab_size, **columns),
    )


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [{"top_k": 7}, {"top_p": 0.4}, {"top_k": 30, "top_p": 0.5}])
def test_of_tied_tokens_the_first_are_kept(columns: dict[str, float], dtype: torch.dtype) -> None:
    """All draws of many seeds together show the kept set itself, ties cut at the right id."""
    vocab_size, num_rows = (5000, 2000) if HAS_GPU else (60, 60)
    row = (randn(vocab_size) * 2).round().div(2)
    row[row.abs() < 0.6] = -0.0
    row[::5] = row[::5].abs()
    logits = row.to(dtype).repeat(num_rows, 1)
    table = Table(num_rows, vocab_size, **columns)
    tokens = check(logits, table).cpu()
    slots = table.slots.long()[:1]
    ids, kept = _filter(
        logits[:1].float().cpu(), table.top_k[slots].long(), table.top_p[slots], table.min_p[slots]
    )
    kept_ids = set(ids[kept > -torch.inf].tolist())
    assert set(tokens.tolist()) <= kept_ids
    if HAS_GPU and len(kept_ids) < 50:
        assert set(tokens.tolist()) == kept_ids


def test_a_table_of_mixed_parameters_and_strided_logits() -> None:
    vocab_size, num_rows = (151936, 16) if HAS_GPU else (4200, 8)
    table = Table(
        num_rows,
        vocab_size,
        temperature=torch.tensor([0.0, 1.0, 0.6, 0.8] * (num_rows // 4)),
        top_k=torch.tensor([20, vocab_size, 20, vocab_size] * (num_rows // 4)),
        top_p=torch.tensor([1.0, 1.0, 0.95, 0.9] * (num_rows // 4)),
    )
    logits = randn(num_rows, vocab_size + 40, dtype=torch.bfloat16, scale=3)
    logits[:, vocab_size:] = torch.nan
    check(logits[:, :vocab_size], table)
