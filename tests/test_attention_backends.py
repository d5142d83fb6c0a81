"""Which backend attends in a prefill, and that each is told what it must be.

FlashAttention runs on a GPU alone, so stand-ins with its functions' parameters are imported in its
place: they check what they are given as its C++ does, and compute the answer in plain PyTorch.
"""

import importlib
import inspect
import json
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm_cli.core.attention_backend import (
    AttentionBackend,
    PackedSequences,
    attention_backends,
    choose_attention_backend,
    find_attention_backend,
)
from nanovllm_cli.core.batch import packed_positions
from nanovllm_cli.core.errors import UserError
from nanovllm_cli.doctor import doctor
from nanovllm_cli.kernels.triton_import import HAS_TRITON

from .stand_in_gpus import stand_in_gpus

HOPPER, AMPERE = (9, 0), (8, 0)
MODULES = {
    "flash-attn-3": "flash_attn_interface",
    "flash-attn": "flash_attn",
    "torch": "torch.nn.attention.varlen",
}


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, kv_lens: Tensor
) -> Tensor:
    """Causal attention over pages, each sequence's queries its last; checks like theirs in C++.

    k, v: [num_blocks, page_size, num_kv_heads, head_dim].
    """
    num_sequences = len(kv_lens)
    for integers in (block_table, cu_seqlens_q, kv_lens):
        assert integers.dtype == torch.int32
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert cu_seqlens_q.is_contiguous()
    assert kv_lens.is_contiguous()
    assert cu_seqlens_q.shape == (num_sequences + 1,)
    assert block_table.dim() == 2
    assert len(block_table) == num_sequences
    for tensor in (q, k, v, block_table):
        assert tensor.stride(-1) == 1
    num_blocks, page_size, num_kv_heads, head_dim = k.shape
    assert k.shape == v.shape
    assert q.shape == (int(cu_seqlens_q[-1]), q.shape[1], head_dim)
    assert q.shape[1] % num_kv_heads == 0
    assert num_blocks > block_table.max()
    out = torch.empty_like(q)
    ends = cu_seqlens_q.tolist()
    for row, kv_len in enumerate(kv_lens.tolist()):
        own = slice(ends[row], ends[row + 1])
        blocks = block_table[row, : -(-kv_len // page_size)].long()
        keys, values = (x[blocks].flatten(0, 1)[:kv_len].float() for x in (k, v))
        groups = q.shape[1] // num_kv_heads
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q[own].float(), keys) * head_dim**-0.5
        query_len = own.stop - own.start
        is_future = torch.ones(query_len, kv_len, dtype=torch.bool).triu(kv_len - query_len + 1)
        weights = scores.masked_fill(is_future, -torch.inf).softmax(dim=-1)
        out[own] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out


def check_lengths(sums: Tensor, longest: int) -> Tensor:
    """The lengths behind cumulative ones."""
    lengths = sums.diff().int()
    assert longest == lengths.max()
    return lengths


def flash_attn_2(version: str = "2.8.3") -> ModuleType:
    """flash_attn with the parameters of 2.8.3."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        assert causal
        assert softmax_scale == q.shape[-1] ** -0.5
        assert k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
        check_lengths(cu_seqlens_q, max_seqlen_q)
        kv_lens = check_lengths(cu_seqlens_k, max_seqlen_k)
        return paged_attention(q, k, v, block_table, cu_seqlens_q, kv_lens)

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    module.__version__ = version  # type: ignore[attr-defined]
    return module


def flash_attn_3() -> ModuleType:
    """flash_attn_interface with the parameters of FlashAttention 3."""

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
        cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None,
        cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None,
        q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
        return_softmax_lse=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        assert causal
        assert softmax_scale == q.shape[-1] ** -0.5
        check_lengths(cu_seqlens_q, max_seqlen_q)
        return paged_attention(q, k_cache, v_cache, page_table, cu_seqlens_q, cache_seqlens)

    module = ModuleType("flash_attn_interface")
    module.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    return module


def torch_varlen() -> ModuleType:
    """torch.nn.attention.varlen with the real function's parameters, answered on a CPU."""
    signature = inspect.signature(importlib.import_module(MODULES["torch"]).varlen_attn)

    def varlen_attn(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        assert given["window_size"] == (-1, 0), "what it takes for causal"
        assert given["enable_gqa"]
        assert given["scale"] == given["query"].shape[-1] ** -0.5
        assert given["key"].shape[1] % 256 == 0, "its C++ is FlashAttention 2's"
        check_lengths(given["cu_seq_q"], given["max_q"])
        kv_lens = check_lengths(given["cu_seq_k"], given["max_k"])
        assert torch.equal(kv_lens, given["seqused_k"])
        return paged_attention(
            given["query"],
            given["key"],
            given["value"],
            given["block_table"],
            given["cu_seq_q"],
            given["seqused_k"],
        )

    varlen_attn.__signature__ = signature  # type: ignore[attr-defined]
    module = ModuleType(MODULES["torch"])
    module.varlen_attn = varlen_attn  # type: ignore[attr-defined]
    return module


STAND_INS: dict[str, Callable[[], ModuleType]] = {
    "flash-attn-3": flash_attn_3,
    "flash-attn": flash_attn_2,
    "torch": torch_varlen,
}


def has_paged_varlen() -> bool:
    """Whether this torch's varlen_attn reads pages: 2.11's does not."""
    module = importlib.import_module(MODULES["torch"])
    return "block_table" in inspect.signature(module.varlen_attn).parameters


needs_paged_varlen = pytest.mark.skipif(
    not has_paged_varlen(), reason="this torch's varlen_attn has no block_table"
)
PAGED = [
    "flash-attn-3",
    "flash-attn",
    pytest.param("torch", marks=needs_paged_varlen),
]


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Of the optional packages these alone are there."""
    for name, module in MODULES.items():
        stand_in = STAND_INS[name]() if name in names else None  # None: as if not installed
        monkeypatch.setitem(sys.modules, module, stand_in)


class Prefill:
    """Random pages and packed queries, NaN wherever no sequence's keys lie."""

    def __init__(
        self,
        lens: list[tuple[int, int]],  # (cached tokens, new tokens) of each sequence
        *,
        dtype: torch.dtype = torch.float16,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 64,
        block_size: int = 256,
        device: str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(len(lens))
        query_lens = torch.tensor([new for _, new in lens], dtype=torch.int32)
        kv_lens = torch.tensor([cached + new for cached, new in lens], dtype=torch.int32)
        counts = [-(-int(length) // block_size) for length in kv_lens]
        shape = (sum(counts) + 2, num_kv_heads, block_size, head_dim)
        k, v = torch.full((2, *shape), torch.nan, dtype=dtype)
        block_tables = torch.zeros(len(lens), max(counts) + 1, dtype=torch.int32)
        free = (torch.randperm(sum(counts), generator=generator) + 2).tolist()
        for row, length in enumerate(kv_lens.tolist()):
            for index in range(counts[row]):
                block = free.pop()
                block_tables[row, index] = block
                live = min(length - index * block_size, block_size)
                for pages in (k, v):
                    values = torch.randn(num_kv_heads, live, head_dim, generator=generator)
                    pages[block, :, :live] = values.to(dtype)
        num_tokens = int(query_lens.sum())
        q = torch.randn(num_tokens, num_heads, head_dim, generator=generator).to(dtype)
        self.q, self.k, self.v = q.to(device), k.to(device), v.to(device)
        zero = torch.zeros(1, dtype=torch.int32)
        self.sequences = PackedSequences(
            block_tables=block_tables.to(device),
            rows=torch.arange(len(lens), dtype=torch.int32, device=device),
            start_positions=(kv_lens - query_lens).to(device),
            kv_lens=kv_lens.to(device),
            cu_seqlens_q=torch.cat((zero, query_lens.cumsum(0).int())).to(device),
            cu_seqlens_k=torch.cat((zero, kv_lens.cumsum(0).int())).to(device),
            max_query_len=int(query_lens.max()),
            max_kv_len=int(kv_lens.max()),
        )

    def run(self, backend: AttentionBackend) -> Tensor:
        return backend.prefill(self.q, self.k, self.v, self.sequences)

    def expected(self) -> Tensor:
        """One sequence after the other, by PyTorch's own attention in fp32."""
        sequences = self.sequences
        block_size = self.k.shape[2]
        ends = sequences.cu_seqlens_q.tolist()
        out = []
        for row, kv_len in enumerate(sequences.kv_lens.tolist()):
            blocks = sequences.block_tables[row, : -(-kv_len // block_size)].long()
            k, v = (
                torch.cat([pages[block] for block in blocks], dim=1)[:, :kv_len].float()
                for pages in (self.k, self.v)
            )
            q = self.q[ends[row] : ends[row + 1]].float().transpose(0, 1)
            positions = torch.arange(kv_len - q.shape[1], kv_len, device=q.device)
            is_past = torch.arange(kv_len, device=q.device) <= positions[:, None]
            attended = F.scaled_dot_product_attention(
                q[None], k[None], v[None], is_past, enable_gqa=True
            )
            out.append(attended[0].transpose(0, 1))
        return torch.cat(out).to(self.q.dtype)

    def check(self, backend: AttentionBackend) -> None:
        out, expected = self.run(backend), self.expected()
        assert out.shape == expected.shape
        assert out.dtype == expected.dtype
        error = (out.float() - expected.float()).abs().max()
        assert error <= (4e-3 if out.dtype == torch.float16 else 3e-2), error


RAGGED = [(0, 5), (0, 300), (256, 1), (37, 70), (0, 256), (511, 2), (1, 1), (300, 260)]


def find(name: str, *, block_size: int = 256, dtype: str = "float16") -> AttentionBackend:
    found = find_attention_backend(
        name,  # type: ignore[arg-type]
        dtype=dtype,
        block_size=block_size,
        capability=HOPPER,
    )
    assert isinstance(found, AttentionBackend), found
    return found


@pytest.mark.parametrize("name", PAGED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_backend_is_given_what_it_asks_for_and_gives_the_references_answer(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, name)
    backend = find(name)
    Prefill(RAGGED, dtype=dtype).check(backend)
    Prefill([(0, 1)], dtype=dtype, num_heads=6, num_kv_heads=1).check(backend)
    Prefill([(700, 30), (0, 2)], dtype=dtype, num_heads=2, head_dim=128).check(backend)


def test_flash_attention_3_reads_pages_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash-attn-3")
    for block_size in (16, 64, 128):
        Prefill(RAGGED, block_size=block_size).check(find("flash-attn-3", block_size=block_size))


def test_the_pages_are_passed_as_views(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash-attn")
    seen: list[Tensor] = []
    module = sys.modules["flash_attn"]
    real = module.flash_attn_varlen_func

    def spy(q, k, v, **kwargs):  # type: ignore[no-untyped-def]
        seen.extend((k, v))
        return real(q, k, v, **kwargs)

    spy.__signature__ = inspect.signature(real)  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "flash_attn_varlen_func", spy)
    prefill = Prefill([(0, 9)])
    prefill.check(find("flash-attn"))
    assert [x.data_ptr() for x in seen] == [prefill.k.data_ptr(), prefill.v.data_ptr()]


@needs_paged_varlen
def test_torchs_own_varlen_attn_takes_our_arguments() -> None:
    # On meta tensors its real function and its operator's schema run, and no kernel does.
    prefill = Prefill(RAGGED, device="meta")
    out = prefill.run(find("torch"))
    assert out.shape == prefill.q.shape
    assert out.dtype == prefill.q.dtype


@pytest.mark.skipif(not HAS_TRITON, reason="Triton's interpreter is off")
def test_the_triton_backend_gives_the_references_answer() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for block_size in (16, 64):
        prefill = Prefill(RAGGED, block_size=block_size, device=device)
        prefill.check(find("triton", block_size=block_size))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash-attn-3", "flash-attn", "torch", "triton"])
@pytest.mark.parametrize("block_size", [64, 256])
def test_every_backend_there_is_gives_the_references_answer_on_a_gpu(
    name: str, block_size: int
) -> None:
    capability = torch.cuda.get_device_capability()
    found = find_attention_backend(
        name,  # type: ignore[arg-type]
        dtype="bfloat16",
        block_size=block_size,
        capability=capability,
    )
    if isinstance(found, str):
        pytest.skip(found)
    Prefill(RAGGED, dtype=torch.bfloat16, block_size=block_size, device="cuda").check(found)
    heads = {"num_heads": 16, "num_kv_heads": 8, "head_dim": 128}
    Prefill(RAGGED, dtype=torch.bfloat16, block_size=block_size, device="cuda", **heads).check(
        found
    )


# Which one is chosen


def chosen(
    wanted: str = "auto",
    *,
    dtype: str = "bfloat16",
    block_size: int = 256,
    capability: tuple[int, int] = HOPPER,
) -> str:
    return choose_attention_backend(
        wanted,  # type: ignore[arg-type]
        dtype=dtype,
        block_size=block_size,
        capability=capability,
    ).name


@needs_paged_varlen
def test_auto_takes_the_best_that_is_there_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash-attn-3", "flash-attn", "torch")
    assert chosen() == chosen(block_size=64) == "flash-attn-3"
    assert chosen(capability=AMPERE) == "flash-attn 2.8.3"
    assert chosen(capability=AMPERE, block_size=64) == "triton"
    assert chosen(dtype="float32") == "triton"
    install(monkeypatch, "flash-attn", "torch")
    assert chosen() == "triton", "on a Hopper ours is faster than FlashAttention 2"
    install(monkeypatch, "torch")
    assert chosen(capability=AMPERE) == "torch-varlen"
    assert chosen(capability=AMPERE, block_size=128) == "triton"
    install(monkeypatch)
    assert chosen() == "triton"


def test_auto_imports_nothing_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_import(name: str) -> ModuleType:
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr("nanovllm_cli.core.attention_backend.importlib.import_module", no_import)
    assert chosen(capability=AMPERE, block_size=64) == "triton"
    assert chosen(dtype="float32") == "triton"


@pytest.mark.parametrize("name", ["flash-attn-3", "flash-attn", "torch", "triton"])
def test_a_backend_can_be_forced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "torch" and not has_paged_varlen():
        with pytest.raises(UserError, match="varlen_attn has no block_table"):
            chosen(name)
        return
    install(monkeypatch, "flash-attn-3", "flash-attn", "torch")
    names = {"flash-attn": "flash-attn 2.8.3", "torch": "torch-varlen"}
    assert chosen(name) == names.get(name, name)


@pytest.mark.parametrize("name", ["flash-attn-3", "flash-attn"])
def test_forcing_a_backend_that_is_not_installed_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    with pytest.raises(UserError, match=f"'{name}' cannot run: it is not installed") as caught:
        chosen(name)
    assert caught.value.hint is not None
    assert "--attention-backend" in caught.value.hint


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"block_size": 64}, "--block-size 256, and block_size is 64"),
        ({"dtype": "float32"}, "--dtype bfloat16"),
    ],
)
def test_forcing_a_backend_against_the_other_settings_names_the_flag(
    settings: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "flash-attn")
    with pytest.raises(UserError, match=reason):
        chosen("flash-attn", **settings)


def test_flash_attention_3_is_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash-attn-3")
    for capability in (AMPERE, (10, 0), (12, 0)):
        with pytest.raises(UserError, match="sm_90"):
            chosen("flash-attn-3", capability=capability)


def test_an_import_that_fails_is_a_reason_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEab\nmore")

    monkeypatch.setattr("nanovllm_cli.core.attention_backend.importlib.import_module", broken)
    assert chosen(capability=AMPERE) == "triton"
    found = attention_backends(dtype="bfloat16", block_size=256, capability=AMPERE)
    reason = "its import fails: flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEab"
    assert found["flash-attn"] == reason
    assert isinstance(found["triton"], AttentionBackend)


def test_a_package_that_lacks_one_of_its_own_needs_is_not_called_absent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'einops'", name="einops")

    monkeypatch.setattr("nanovllm_cli.core.attention_backend.importlib.import_module", broken)
    with pytest.raises(UserError, match="its import fails: No module named 'einops'"):
        chosen("flash-attn")


def test_a_function_without_pages_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    # As in torch 2.11: the function is there, its block_table is not.
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):  # type: ignore[no-untyped-def]
        raise AssertionError("called")

    module = ModuleType(MODULES["torch"])
    module.varlen_attn = varlen_attn  # type: ignore[attr-defined]
    install(monkeypatch)
    monkeypatch.setitem(sys.modules, MODULES["torch"], module)
    assert chosen() == "triton"
    with pytest.raises(UserError, match="varlen_attn has no block_table"):
        chosen("torch")


def doctors_report(
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
    capability: tuple[int, int],
) -> dict[str, Any]:
    """What `nanovllm doctor --json` says on a machine with such a GPU."""
    stand_in_gpus(monkeypatch, "NVIDIA Stand-in", capability=capability)
    doctor(as_json=True)
    return json.loads(capsysbinary.readouterr().out)


def test_doctor_says_which_backend_runs_and_why_the_others_do_not(
    monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    install(monkeypatch, "flash-attn")
    report = doctors_report(monkeypatch, capsysbinary, AMPERE)
    assert report["runs_on"] == "cuda"
    assert report["attention"] == "prefill triton, decode triton"
    backends = report["attention_backends"]
    assert list(backends) == ["flash-attn-3", "flash-attn", "torch", "triton"]
    assert backends["flash-attn-3"] == "not used: it is not installed"
    assert "--block-size 256" in backends["flash-attn"]
    assert backends["triton"] == "triton"


def test_doctor_says_why_a_gpu_is_not_used(
    monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    report = doctors_report(monkeypatch, capsysbinary, (7, 5))
    assert report["runs_on"].startswith("cpu, with --device cpu: NVIDIA Stand-in is sm_75")


def test_packed_positions_count_from_each_sequences_start() -> None:
    sequences, positions = packed_positions(
        np.array([3, 1, 2], dtype=np.int32), np.array([0, 7, 64], dtype=np.int32)
    )
    assert sequences.tolist() == [0, 0, 0, 1, 2, 2]
    assert positions.tolist() == [0, 1, 2, 7, 64, 65]
