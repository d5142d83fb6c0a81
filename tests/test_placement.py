"""What is advised for a model on some GPUs: pure, from facts that stand in for machines."""

from typing import Literal

import pytest

from nanovllm_cli.builtin_configs import builtin_config
from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.doctor import all_reduce
from nanovllm_cli.gpus import Gpu, GpuLink, describe_links
from nanovllm_cli.placement import Needs, advise, advise_cpu, notes, parallel_notes

from .cli import MODEL

H200 = Gpu(name="NVIDIA H200", memory_bytes=140 << 30, capability=(9, 0))
H100 = Gpu(name="NVIDIA H100 80GB HBM3", memory_bytes=79 << 30, capability=(9, 0))
A10 = Gpu(name="NVIDIA A10", memory_bytes=22 << 30, capability=(8, 6))


def needs(name: str) -> Needs:
    model = builtin_config(name)
    assert model is not None
    return Needs(model=model, dtype_bytes=2, max_model_len=model.max_context, utilization=0.92)


@pytest.mark.parametrize(
    ("name", "gpus", "advice"),
    [
        ("Qwen3-0.6B", [H100], "no flag: it fits one GPU (7.5 of 72.7 GiB), and there is one"),
        ("Qwen3-0.6B", [H100] * 2, "--dp 2: it fits one GPU"),
        ("Qwen3-8B", [A10] * 2, "--tp 2: one GPU would take 22.9 of 20.2 GiB, each of 2 12.4 of"),
        ("Qwen3-32B", [H200] * 2, "--dp 2: it fits one GPU (73.0 of 128.8 GiB)"),
        ("Qwen3-32B", [H100] * 2, "--tp 2: one GPU would take 73.0 of 72.7 GiB"),
        ("Qwen3-32B", [H100] * 8, "--tp 2 --dp 4: "),
        ("Qwen3-32B", [H100, H200], "--tp 2: "),  # the smaller one must do
        ("Qwen3-32B", [A10], "it does not fit: the GPU takes 73.0 of 20.2 GiB on each"),
        ("Qwen3-32B", [A10] * 2, "it does not fit: --tp 2, the most that divides it here, takes"),
        ("Qwen3-32B", [A10] * 4, "--tp 4: "),
        ("Qwen3-32B", [A10] * 7, "--tp 4: "),
    ],
)  # fmt: skip
def test_a_model_goes_on_as_few_gpus_as_it_fits(name: str, gpus: list[Gpu], advice: str) -> None:
    assert advise(needs(name), gpus).startswith(advice)


def test_gpus_that_are_left_over_are_named() -> None:
    assert advise(needs("Qwen3-32B"), [A10] * 7).endswith("; 3 of 7 stay idle")
    assert "idle" not in advise(needs("Qwen3-32B"), [A10] * 4)


def test_a_rank_needs_its_part_of_the_weights_and_of_the_cache() -> None:
    of = needs("Qwen3-8B")
    working = 2 << 30
    alone, half = of.of_each(1) - working, of.of_each(2) - working
    norms = 36 * 2 * (4096 + 128) + 4096  # every rank has them whole
    assert 2 * half - alone == pytest.approx(2 * norms, abs=1)
    assert alone == of.model.num_parameters * 2 + 40960 * of.model.kv_bytes_per_token(2)


def test_a_machine_without_a_gpu_is_told_so_plainly() -> None:
    small, large = builtin_config("Qwen3-0.6B"), builtin_config("Qwen3-8B")
    assert small is not None
    assert large is not None
    fits = "there is no GPU to run it on; on the CPU its weights, 2.2 GiB in float32, fit the 16.0"
    assert advise_cpu(small, 16 << 30).startswith(fits)
    assert "30.5 GiB in float32, do not fit the 16.0 GiB" in advise_cpu(large, 16 << 30)


def test_a_job_is_told_of_what_would_be_faster_and_of_gpus_that_differ() -> None:
    def said(name: str, gpus: list[Gpu], tp: int, dp: int) -> list[str]:
        return notes(needs(name), gpus, tp=tp, dp=dp)

    hint = "the model fits one GPU (7.5 of 72.7 GiB): --dp 4 is faster than --tp 2"
    assert said("Qwen3-0.6B", [H100] * 4, 2, 2) == [hint]
    assert said("Qwen3-32B", [H100] * 2, 2, 1) == []
    assert said("Qwen3-0.6B", [H100] * 2, 1, 2) == []
    (differ,) = said("Qwen3-0.6B", [H100, A10, A10], 1, 3)
    assert differ.startswith(
        "the GPUs differ (NVIDIA H100 80GB HBM3, 79 GiB, sm_90; NVIDIA A10, 22 GiB, sm_86): "
    )


def test_links_of_one_kind_share_a_line() -> None:
    def link(a: int, b: int, path: str = "NVLink (18 links a GPU)", peers: bool = True) -> GpuLink:
        return GpuLink(pair=(a, b), path=path, are_peers=peers)

    assert describe_links([link(0, 1)]) == ["0-1: NVLink (18 links a GPU), peer access"]
    alike = [link(0, 1), link(0, 2), link(1, 2)]
    assert describe_links(alike) == ["every pair: NVLink (18 links a GPU), peer access"]
    mixed = [link(0, 1), link(0, 2, "PCIe through a host bridge", False), link(2, 3)]
    assert describe_links(mixed) == [
        "0-1, 2-3: NVLink (18 links a GPU), peer access",
        "0-2: PCIe through a host bridge, no peer access",
    ]
    assert describe_links([]) == []


def test_sums_are_fused_where_all_ranks_are_peers_and_it_was_measured() -> None:
    def link(a: int, b: int, are_peers: bool) -> GpuLink:
        return GpuLink(pair=(a, b), path="", are_peers=are_peers)

    links = [link(0, 1, True), link(0, 2, False), link(1, 2, False)]
    assert all_reduce(2, links) == "fused with residual and norm"
    assert all_reduce(2, [link(0, 1, False)]) == "nccl"
    assert all_reduce(4, links) == "nccl"


def test_a_job_on_several_gpus_is_told_before_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(tp: int, dp: int, device: Literal["auto", "cpu"] = "auto") -> list[str]:
        return parallel_notes(EngineConfig(device=device, tensor_parallel_size=tp), dp, MODEL)

    gpus = [H100, H100, A10, A10]
    monkeypatch.setattr("nanovllm_cli.core.cuda_driver.visible_gpus", lambda: tuple(gpus))
    assert said(1, 1) == []
    (hint,) = said(2, 1)
    assert hint.endswith("--dp 2 is faster than --tp 2")
    (differ,) = said(1, 4)
    assert differ.startswith("the GPUs differ")
    assert said(1, 2) == []
    assert said(2, 2, "cpu") == []
