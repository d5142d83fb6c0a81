"""Sampling: which tokens may be drawn, how often each is, and that no draw sees its neighbours."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanovllm_cli.core.batch import Admission
from nanovllm_cli.core.sampler import sample
from nanovllm_cli.core.slot_table import SlotTable
from nanovllm_cli.kernels.sampling import (
    _filter,
    gumbel_noise_reference,
    philox_reference,
    sample_reference,
)

Settings = dict[str, Any]

# Mixed into one batch, in this order and others.
FILTERS: list[Settings] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"top_k": 1},
    {"top_p": 0.3},
    {"min_p": 0.2},
    {"temperature": 2.5, "top_k": 7, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.01, "min_p": 1.0},
    {"top_p": 1e-9},
    {"top_k": 150, "top_p": 0.999},
]


def columns(rows: list[Settings], vocab_size: int) -> dict[str, Tensor]:
    """sample_reference's keywords, a row for each of `rows`."""

    def column(name: str, default: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor([row.get(name, default) for row in rows], dtype=dtype)

    return {
        "temperature": column("temperature", 1.0, torch.float32),
        "top_k": column("top_k", vocab_size, torch.int64).clamp(max=vocab_size),
        "top_p": column("top_p", 1.0, torch.float32),
        "min_p": column("min_p", 0.0, torch.float32),
        "seed": column("seed", 0, torch.int64),
        "position": column("position", 0, torch.int64),
    }


def random_logits(num_rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def our_log_probabilities(logits: Tensor, settings: Settings) -> Tensor:
    """Over the whole vocabulary, -inf for what is filtered out."""
    given = columns([settings] * len(logits), logits.shape[1])
    scaled = logits.float() / given["temperature"].unsqueeze(1)
    ids, kept = _filter(scaled, given["top_k"], given["top_p"], given["min_p"])
    whole = torch.full_like(scaled, -torch.inf).scatter(1, ids, kept)
    return whole.log_softmax(dim=-1)


def their_log_probabilities(logits: Tensor, settings: Settings) -> Tensor:
    """transformers' warpers, in the order in which its generate() builds them."""
    warpers = LogitsProcessorList()
    if "temperature" in settings:
        warpers.append(TemperatureLogitsWarper(settings["temperature"]))
    if "top_k" in settings:
        warpers.append(TopKLogitsWarper(settings["top_k"]))
    if settings.get("top_p", 1.0) < 1.0:
        warpers.append(TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        warpers.append(MinPLogitsWarper(settings["min_p"]))
    no_tokens = torch.empty(len(logits), 0, dtype=torch.int64)
    return warpers(no_tokens, logits.float()).log_softmax(dim=-1)


# Which tokens are kept


CHAINS: list[Settings] = [
    {"temperature": 0.7},
    *({"top_k": k} for k in (1, 2, 50, 499, 500, 10_000)),
    *({"top_p": p} for p in (1e-6, 0.1, 0.5, 0.9, 0.99)),
    *({"min_p": p} for p in (0.001, 0.05, 0.5, 1.0)),
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},  # Qwen3's own, thinking
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"top_k": 30, "top_p": 0.7, "min_p": 0.1},
    {"temperature": 1.7, "top_k": 200, "min_p": 0.02},
    {"temperature": 0.3, "top_p": 0.9, "min_p": 0.3},
]


@pytest.mark.parametrize("settings", CHAINS, ids=str)
def test_the_kept_tokens_and_their_probabilities_are_those_of_transformers(
    settings: Settings,
) -> None:
    logits = random_logits(200, 500)
    ours, theirs = (
        our_log_probabilities(logits, settings),
        their_log_probabilities(logits, settings),
    )
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    kept = ours.isfinite()
    assert (ours[kept] - theirs[kept]).abs().max() < 1e-5


def test_of_equal_logits_exactly_top_k_are_kept_and_they_have_the_lowest_ids() -> None:
    # transformers keeps every token that ties with the last of the top k; k means k here.
    logits = random_logits(100, 64).round()  # about 15 values: ties everywhere
    for top_k in (1, 2, 5, 30, 63):
        kept = our_log_probabilities(logits, {"top_k": top_k}).isfinite()
        assert kept.sum(dim=1).tolist() == [top_k] * 100
        assert not (kept & ~their_log_probabilities(logits, {"top_k": top_k}).isfinite()).any()
        for row, is_kept in zip(logits, kept, strict=True):
            last = row[is_kept].min()
            tied = torch.nonzero(row == last).squeeze(1)
            assert torch.equal(is_kept[tied].sort(descending=True).values, is_kept[tied])


@pytest.mark.parametrize("settings", [{"top_p": 0.5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_ties_change_nothing_but_which_of_the_equals_is_kept(settings: Settings) -> None:
    logits = random_logits(100, 64).round()
    ours = our_log_probabilities(logits, settings)
    theirs = their_log_probabilities(logits, settings)
    assert torch.equal(ours.isfinite().sum(dim=1), theirs.isfinite().sum(dim=1))
    ours, theirs = ours.sort(dim=1).values, theirs.sort(dim=1).values
    kept = ours.isfinite()
    assert (ours[kept] - theirs[kept]).abs().max() < 1e-5


def test_tokens_that_are_ruled_out_are_never_kept() -> None:
    logits = random_logits(50, 100)
    logits[:, ::3] = -torch.inf
    for settings in FILTERS:
        if settings.get("temperature") == 0.0:
            continue
        kept = our_log_probabilities(logits, settings).isfinite()
        assert not kept[:, ::3].any()
        assert kept.any(dim=1).all()


# How often each is drawn


def draw(logits: Tensor, rows: list[Settings]) -> Tensor:
    return sample_reference(logits, **columns(rows, logits.shape[1]))


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 8}, {"top_p": 0.7}, {"min_p": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("over", ["positions", "seeds"])
def test_draws_follow_the_distribution(settings: Settings, over: str) -> None:
    num_draws, vocab_size = 20_000, 24
    logits = random_logits(1, vocab_size, seed=5) / 2
    rows = [
        {**settings, **({"position": i, "seed": 77} if over == "positions" else {"seed": i})}
        for i in range(num_draws)
    ]
    counts = draw(logits.expand(num_draws, -1).clone(), rows).bincount(minlength=vocab_size)
    expected = our_log_probabilities(logits, settings)[0].exp() * num_draws
    assert not counts[expected == 0].any()
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    # The 99.99 % point, by Wilson and Hilferty's approximation.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < limit


def test_neighbouring_positions_and_seeds_are_drawn_independently() -> None:
    logits = torch.zeros(4000, 2)
    for name in ("position", "seed"):
        bits = draw(logits, [{name: i} for i in range(4000)])
        assert abs(bits.sum().item() - 2000) < 4 * math.sqrt(1000)
        changes = (bits[1:] != bits[:-1]).sum().item()
        assert abs(changes - 2000) < 4 * math.sqrt(1000)


# Whose company does not matter


@pytest.mark.parametrize("vocab_size", [160, 5000])
def test_a_row_draws_the_same_token_alone_and_in_any_batch(vocab_size: int) -> None:
    rows = [
        {**settings, "seed": seed, "position": position}
        for settings in FILTERS
        for seed, position in ((0, 0), (3, 9), (2**40 + 1, 800), (-(2**63), 5))
    ]
    logits = random_logits(len(rows), vocab_size).round(decimals=1)  # with some ties
    together = draw(logits.clone(), rows)
    for i, row in enumerate(rows):
        assert draw(logits[i : i + 1].clone(), [row])[0] == together[i], row
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = draw(logits[order], [rows[i] for i in order])
    assert torch.equal(shuffled, together[order])


def test_a_top_p_at_the_very_edge_of_a_token_keeps_the_same_in_any_batch() -> None:
    # Sums of a row and of the same row with zeros behind it may differ in the last bit.
    vocab_size, num_rows = 3000, 400
    logits = random_logits(num_rows, vocab_size)
    ranked = logits.sort(dim=1, descending=True).values[:, :50]
    cumulative = (ranked - ranked[:, :1]).exp().cumsum(dim=1)
    index = torch.arange(num_rows) % 20 + 1
    edges = cumulative.gather(1, index.unsqueeze(1))[:, 0] / cumulative[:, -1]
    rows: list[Settings] = [{"top_k": 50, "top_p": edge} for edge in edges.tolist()]
    wide: list[Settings] = [{}]
    narrow_given, wide_given = columns(rows, vocab_size), columns(rows + wide, vocab_size)
    filters = ("top_k", "top_p", "min_p")
    _, narrow = _filter(logits, *(narrow_given[name] for name in filters))
    wider = torch.cat((logits, logits[:1]))
    _, together = _filter(wider, *(wide_given[name] for name in filters))
    assert narrow.shape[1] < together.shape[1] == vocab_size
    num_kept = narrow.isfinite().sum(dim=1)
    assert torch.equal(num_kept, together[:-1].isfinite().sum(dim=1))
    assert set((num_kept - index).tolist()) <= {1, 2}, "these were no edges"


def test_a_tie_of_noisy_logits_goes_to_the_lowest_id_in_any_batch() -> None:
    # With seed 4 token 2 has more noise than token 5, and reaches the same sum from a lower logit.
    # About one draw in a million is such a tie.
    ids = torch.arange(8).unsqueeze(0)
    noise = gumbel_noise_reference(ids, torch.tensor([4]), torch.tensor([0]))[0]
    assert noise[2] > noise[5]
    num_ties = 0
    for total in torch.arange(3, 6, 1 / 64):
        logits = torch.full((1, 8), -50.0)
        logits[0, [2, 5]] = total - noise[[2, 5]]
        sums = logits[0] + noise
        if sums[2] == sums[5]:
            num_ties += 1
            assert draw(logits.clone(), [{"seed": 4}]).item() == 2
            assert draw(logits.repeat(2, 1), [{"seed": 4}, {"top_k": 3}])[0].item() == 2
    assert num_ties > 0


def test_a_draw_depends_on_the_seed_and_the_position() -> None:
    logits = torch.zeros(1, 1000)
    tokens = {
        draw(logits.clone(), [{"seed": seed, "position": position}]).item()
        for seed in (0, 1, 2**32, -1)
        for position in (0, 1, 1023)
    }
    assert len(tokens) >= 11


# Greedy


def test_temperature_zero_takes_the_largest_logit_and_of_equals_the_lowest_id() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [7.0, 7.0, 7.0, 7.0], [-4.0, -3.0, -9.0, -3.0]])
    for dtype in (torch.float32, torch.bfloat16):
        assert draw(logits.to(dtype), [{"temperature": 0.0}] * 3).tolist() == [1, 0, 1]


def test_top_k_of_one_is_greedy() -> None:
    logits = random_logits(200, 300).round(decimals=1)
    greedy = draw(logits.clone(), [{"temperature": 0.0}] * 200)
    rows = [{"top_k": 1, "seed": i, "temperature": 50.0} for i in range(200)]
    assert torch.equal(draw(logits.clone(), rows), greedy)


@pytest.mark.parametrize("temperature", [1e-5, 1e-6, 1e-20, 1e-38, 1e-40, 1e-300])
@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_a_very_low_temperature_is_greedy(temperature: float, settings: Settings) -> None:
    logits = random_logits(50, 300)
    greedy = draw(logits.clone(), [{"temperature": 0.0}] * 50)
    rows = [{**settings, "temperature": temperature, "seed": i} for i in range(50)]
    assert torch.equal(draw(logits, rows), greedy)


# The slot table's part


def table_of(rows: list[Settings], vocab_size: int) -> SlotTable:
    """A slot table whose slot i holds rows[i]; `length` tokens are known."""
    table = SlotTable(len(rows), 4, torch.device("cpu"))
    table.admit(
        tuple(
            Admission(
                slot=i,
                seed=row.get("seed", 0),
                temperature=row.get("temperature", 1.0),
                top_k=min(row.get("top_k", vocab_size), vocab_size),
                top_p=row.get("top_p", 1.0),
                min_p=row.get("min_p", 0.0),
                min_length=row.get("min_length", 0),
                max_length=99,
                stop_token_ids=row.get("stop_token_ids", ()),
            )
            for i, row in enumerate(rows)
        )
    )
    table.length[: len(rows)] = torch.tensor([row.get("length", 5) for row in rows])
    return table


def test_seeds_of_64_bits_reach_the_generator_whole() -> None:
    seeds = [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    table = table_of([{"seed": seed} for seed in seeds], 100)
    assert [seed % 2**64 for seed in table.seed.tolist()[:6]] == seeds
    token_ids, _ = sample(torch.zeros(6, 100_000), table, torch.arange(6))
    assert len(set(token_ids.tolist())) == 6


def test_no_stop_token_is_drawn_before_min_length() -> None:
    logits = torch.zeros(3, 50)
    logits[:, 7], logits[:, 8] = 90.0, 80.0
    row: Settings = {"stop_token_ids": (7, 9), "min_length": 6}
    rows = [{**row, "length": 5}, {**row, "length": 6}, {**row, "stop_token_ids": (), "length": 5}]
    token_ids, is_nan = sample(logits, table_of(rows, 50), torch.arange(3))
    assert token_ids.tolist() == [8, 7, 7]
    assert not is_nan.any()


@pytest.mark.parametrize("settings", FILTERS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_with_bad_logits_is_named_and_the_others_draw_as_ever(
    settings: Settings, bad: float
) -> None:
    rows = [{**settings, "seed": i} for i in range(4)]
    logits = random_logits(4, 60)
    slots = torch.arange(4)
    expected, _ = sample(logits.clone(), table_of(rows, 60), slots)
    logits[1, 30] = bad
    logits[2] = bad
    token_ids, is_nan = sample(logits.clone(), table_of(rows, 60), slots)
    assert is_nan.tolist() == [False, True, True, False]
    assert token_ids[[0, 3]].tolist() == expected[[0, 3]].tolist()
    alone, is_nan = sample(logits[2:3].clone(), table_of(rows, 60), slots[2:3])
    assert is_nan.tolist() == [True]
    assert 0 <= alone.item() < 60


def test_logits_of_minus_infinity_everywhere_are_bad_too() -> None:
    _, is_nan = sample(torch.full((1, 9), -torch.inf), table_of([{}], 9), torch.arange(1))
    assert is_nan.tolist() == [True]


# Philox


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox 4x32-7 on Python's integers, after Random123's philox.h."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(7):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (p1 >> 32) ^ c1 ^ k0,
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c3 ^ k1,
            p0 & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


# Random123's kat_vectors: philox4x32 7 rounds, counter, key, result.
ALL_ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_the_philox_of_this_test_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, int], result: tuple[int, ...]
) -> None:
    assert philox(counter, key) == result


def test_philox_of_zeros_gives_the_published_answer() -> None:
    zero = torch.zeros(1, 1, dtype=torch.int64)
    words = philox_reference(zero, zero, zero)
    assert tuple(int(word) for word in words) == KNOWN_ANSWERS[0][2]


def test_philox_is_philox_for_every_counter_position_and_seed() -> None:
    counters = torch.tensor([0, 1, 1023, 12345, 2**31, 2**32 - 1])
    positions = torch.tensor([0, 1, 40959, 2**32 - 1]).unsqueeze(1)
    for seed in (0, 1, 0xDEADBEEF, 2**32, 2**63 - 1, -1, -(2**63)):
        seeds = torch.full((4, 1), seed)
        words = philox_reference(counters.expand(4, -1), positions, seeds)
        for i, position in enumerate(positions[:, 0].tolist()):
            for j, counter in enumerate(counters.tolist()):
                key = (seed & ALL_ONES, (seed >> 32) & ALL_ONES)
                expected = philox((counter, position, 0, 0), key)
                assert tuple(int(word[i, j]) for word in words) == expected


def test_every_token_has_a_noise_of_its_own() -> None:
    token_ids = torch.arange(20_000).unsqueeze(0)
    noise = gumbel_noise_reference(token_ids, torch.tensor([5]), torch.tensor([3]))[0]
    assert noise.isfinite().all()
    assert len(noise.unique()) > 19_900  # equal ones by chance: 2**-24 each pair, or so
    # Standard Gumbel: the mean is Euler's constant, the variance pi^2 / 6.
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.04)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.1)
    some = torch.tensor([[7, 19_999, 4096, 0]])
    again = gumbel_noise_reference(some, torch.tensor([5]), torch.tensor([3]))[0]
    assert torch.equal(again, noise[some[0]])
