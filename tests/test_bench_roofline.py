"""The bound of a workload: against figures worked out apart, and against what it must obey."""

import numpy as np
import pytest

from nanovllm_cli.builtin_configs import builtin_config
from nanovllm_cli.core.machine_rates import MachineRates
from nanovllm_cli.roofline import Load, bound, loads
from nanovllm_cli.workloads import WORKLOADS

# An H200 as measured: read-only bandwidth, and cuBLAS bf16 at 8192 x 8192 x 8192.
H200 = MachineRates(
    bytes_per_second=4.54e12,
    flops_per_second=790e12,
    bytes_measured_by="",
    flops_measured_by="",
)
FAST_MEMORY = MachineRates(
    bytes_per_second=1e30, flops_per_second=1e12, bytes_measured_by="", flops_measured_by=""
)


def seconds(
    size: str, workload: str, *, is_shared: bool = True, max_num_seqs: int = 4096
) -> tuple[float, float]:
    """(prefill, decode)"""
    model = builtin_config(f"Qwen3-{size}")
    assert model is not None
    sequences = loads(WORKLOADS[workload](0), is_shared=is_shared)
    least = bound(
        model, 2, sequences, H200, max_num_seqs=max_num_seqs, max_num_batched_tokens=16384
    )
    return least.prefill_seconds, least.decode_seconds


@pytest.mark.parametrize(
    ("size", "workload", "num_tokens", "expected"),
    [
        ("0.6B", "nano", 133_966, 38_024),
        ("0.6B", "decode-heavy", 1024 * 1024, 56_097),
        ("0.6B", "prefill-heavy", 512 * 2048, 554_000),  # prompt tokens
        ("0.6B", "shared-prefix", 64_000, 43_188),
        ("0.6B", "short-answers", 4096 * 32, 104_634),
        ("8B", "nano", 133_966, 13_110),
    ],
)
def test_the_bound_is_the_one_worked_out_for_an_h200(
    size: str, workload: str, num_tokens: int, expected: float
) -> None:
    assert num_tokens / sum(seconds(size, workload)) == pytest.approx(expected, rel=0.005)


def test_without_sharing_every_prompt_is_computed_and_read_by_itself() -> None:
    prefill, _ = seconds("0.6B", "shared-prefix")
    all_prefill, all_decode = seconds("0.6B", "shared-prefix", is_shared=False)
    assert 64_000 / (prefill + all_decode) == pytest.approx(15_663, rel=0.005)
    assert 64_000 / (all_prefill + all_decode) == pytest.approx(10_159, rel=0.005)


def test_fewer_sequences_at_a_time_take_no_less() -> None:
    times = [sum(seconds("0.6B", "nano", max_num_seqs=n)) for n in (256, 64, 7, 1)]
    assert times == sorted(times)
    assert times[0] < times[1]


def test_one_sequence_reads_its_weights_once_a_step() -> None:
    model = builtin_config("Qwen3-8B")
    assert model is not None
    rates = MachineRates(
        bytes_per_second=1e12, flops_per_second=1e30, bytes_measured_by="", flops_measured_by=""
    )
    alone = [Load(prompt=1, own_prompt=1, completion=11)]
    least = bound(model, 2, alone, rates, max_num_seqs=1, max_num_batched_tokens=100)
    weights = 2 * (model.num_parameters - model.vocab_size * model.hidden_size)  # a row is read
    assert least.decode_seconds == pytest.approx(10 * weights / 1e12, rel=0.001)
    assert least.prefill_seconds == pytest.approx(weights / 1e12, rel=0.001)


def test_every_distinct_prefix_has_one_owner() -> None:
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 2, random.integers(1, 9), dtype=np.int32) for _ in range(200)]
    owned = loads([(prompt, 3) for prompt in prompts], is_shared=True)
    distinct = {tuple(prompt[:n]) for prompt in prompts for n in range(1, len(prompt) + 1)}
    seen: set[tuple[int, ...]] = set()
    num_repeated = 0  # equal prompts, and those that begin another: their last token is computed
    for prompt in sorted(tuple(map(int, prompt)) for prompt in prompts):
        num_repeated += prompt in seen
        seen |= {prompt[:n] for n in range(1, len(prompt) + 1)}
    assert sum(load.own_prompt for load in owned) == len(distinct) + num_repeated
    assert [load.prompt for load in owned] == [len(prompt) for prompt in prompts]


def test_sequences_of_one_token_take_no_step() -> None:
    model = builtin_config("Qwen3-0.6B")
    assert model is not None
    sequences = [Load(prompt=5, own_prompt=5, completion=1)] * 3
    least = bound(model, 2, sequences, FAST_MEMORY, max_num_seqs=2, max_num_batched_tokens=8)
    assert least.decode_seconds == 0
    assert least.prefill_seconds > 0
