"""The kernels that change logits before a token is chosen, against their references."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from nanovllm_cli.kernels.logit_bias import bias_logits, bias_logits_reference
from nanovllm_cli.kernels.penalties import NEVER, penalize, penalize_reference, unpack_bits
from nanovllm_cli.kernels.token_counts import MAX_COUNT, record_tokens, record_tokens_reference
from nanovllm_cli.kernels.token_mask import mask_tokens, mask_tokens_reference

from .triton_tests import DEVICE, DTYPES, HAS_GPU

VOCAB_SIZES = [1, 123, 5000] + ([151936] if HAS_GPU else [])
NUM_SLOTS = 7
NUM_BIASES, NUM_WORDS, WIDTH = 300, 64, 16


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def made_up_table(vocab_size: int) -> SimpleNamespace:
    """Columns on the CPU, every kind of slot among them."""
    generator = torch.Generator().manual_seed(vocab_size)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32)

    bias_ids = torch.full((NUM_SLOTS, NUM_BIASES), -1, dtype=torch.int32)
    for slot, count in enumerate((0, 1, 5, 300, 0, 2, 17)):
        ids = torch.randperm(vocab_size, generator=generator)[:count]
        bias_ids[slot, : len(ids)] = ids.int()
    last_tokens = integers(min(vocab_size, 4), NUM_SLOTS, WIDTH)
    length = ints([1, 3, 15, 16, 17, 40, 1000])
    bad_words = torch.full((NUM_SLOTS, NUM_WORDS, WIDTH), -1, dtype=torch.int32)
    for slot in range(1, NUM_SLOTS):
        for word in range(slot * 10):
            size = 1 + word % 4 if word else WIDTH
            bad_words[slot, word, -size:] = integers(min(vocab_size, 4), size)
    # A long one that is met: its tokens but the last are what came last.
    recent = [(int(length[6]) - 15 + i) % WIDTH for i in range(15)]
    bad_words[6, 0, :15] = last_tokens[6, recent]
    return SimpleNamespace(
        length=length,
        is_finished=torch.tensor([0, 0, 1, 0, 0, 0, 0], dtype=torch.bool),
        bias_ids=bias_ids,
        bias_values=torch.randn(NUM_SLOTS, NUM_BIASES, generator=generator) * 10,
        bad_words=bad_words,
        last_tokens=last_tokens,
        prompt_words=integers(2**31 - 1, NUM_SLOTS, -(-vocab_size // 32))
        * torch.tensor([[1], [-1], [0], [1], [-1], [0], [1]], dtype=torch.int32),
        counts=(integers(5, NUM_SLOTS, vocab_size) - 2).clamp(min=0).short(),
        repetition=torch.tensor([1.0, 1.3, 0.5, 1.0, 1.0, 2.0, 1.0]),
        presence=torch.tensor([0.0, 0.0, 1.5, -2.0, 0.0, 0.3, 0.0]),
        frequency=torch.tensor([0.0, 0.0, 0.7, 0.0, 0.0, -0.2, 1.1]),
        thinking_end=ints([NEVER, 3, 16, 16, 18, NEVER, 10]),
        end_token=torch.full((NUM_SLOTS,), vocab_size // 2, dtype=torch.int32),
    )


def on_device(table: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(**{name: c.clone().to(DEVICE) for name, c in vars(table).items()})


def check_change(name: str, vocab_size: int) -> None:
    kernel, reference = {
        "bias": (bias_logits, bias_logits_reference),
        "penalties": (penalize, penalize_reference),
    }[name]
    table = made_up_table(vocab_size)
    # Rows lie apart, and not in the slots' order; row 2 asks for nothing.
    logits = torch.randn(8, vocab_size + 3)[:, :vocab_size] * 5
    logits[3, 0] = torch.nan
    logits[5, vocab_size - 1] = -torch.inf
    rows, slots = ints([0, 1, 3, 4, 5, 6, 7]), ints([6, 1, 2, 3, 4, 5, 0])
    expected = logits.clone()
    reference(expected, rows, slots, table.length, table)
    actual = logits.clone().to(DEVICE)
    own = on_device(table)
    kernel(actual, rows.to(DEVICE), slots.to(DEVICE), own.length, own)
    assert torch.equal(actual.cpu().isfinite(), expected.isfinite())
    assert torch.allclose(actual.cpu(), expected, rtol=1e-6, atol=1e-5, equal_nan=True)
    assert torch.equal(actual[2].cpu(), logits[2])
    if vocab_size > 1:
        assert not torch.equal(expected.nan_to_num(), logits.nan_to_num())


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_bias_and_bad_words_are_the_references(vocab_size: int) -> None:
    check_change("bias", vocab_size)


def test_the_longest_bad_word_is_met() -> None:
    table = on_device(made_up_table(123))
    logits = torch.zeros(1, 123, device=DEVICE)
    table.bias_ids.fill_(-1)
    table.bad_words[6, 1:] = -1
    row, slot = ints([0]).to(DEVICE), ints([6]).to(DEVICE)
    bias_logits(logits, row, slot, table.length, table)
    last = int(table.bad_words[6, 0, -1])
    assert logits.isinf().nonzero().tolist() == [[0, last]]


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_penalties_and_forced_tokens_are_the_references(vocab_size: int) -> None:
    check_change("penalties", vocab_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_masks_are_the_references(vocab_size: int, dtype: torch.dtype) -> None:
    logits = torch.randn(5, vocab_size).to(dtype)
    words = torch.randint(-(2**31), 2**31 - 1, (3, -(-vocab_size // 32)), dtype=torch.int32)
    rows = ints([4, 0, 3])
    expected = logits.clone()
    mask_tokens_reference(expected, rows, words)
    actual = logits.clone().to(DEVICE)
    mask_tokens(actual, rows.to(DEVICE), words.to(DEVICE))
    assert torch.equal(actual.cpu(), expected)
    assert torch.equal(expected[1], logits[1])
    assert torch.equal(expected[0].isfinite(), unpack_bits(words[1], vocab_size))


@pytest.mark.parametrize("vocab_size", [5, 123])
def test_tokens_are_recorded_as_by_the_reference(vocab_size: int) -> None:
    table = made_up_table(vocab_size)
    table.counts[5, 3] = MAX_COUNT
    own = on_device(table)
    rows, slots = ints([4, 0, 1, 2, 6]), ints([5, 2, 1, 3, 6])
    sampled = ints([1, vocab_size // 2, vocab_size // 2, 99, 3, 99, 4])
    record_tokens_reference(rows, slots, sampled, table.length, table.is_finished, table)
    record_tokens(*(x.to(DEVICE) for x in (rows, slots, sampled)), own.length, own.is_finished, own)
    for name, column in vars(table).items():
        assert torch.equal(getattr(own, name).cpu(), column), name
    before = made_up_table(vocab_size)
    assert torch.equal(table.counts[2], before.counts[2]), "it is finished"
    assert table.counts[5, 3] == MAX_COUNT, "and not one more"
    assert table.thinking_end[1] == NEVER
    assert table.last_tokens[6, 1000 % WIDTH] == 4
