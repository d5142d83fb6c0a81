"""AttentionBackend: what attends in a GPU's prefills, chosen once at start.

Decode is our own Triton kernel everywhere. A prefill takes the best there is: FlashAttention 3 or
2 where they are installed, PyTorch's own FlashAttention 2 where it reads pages, and else our Triton
kernel, which knows every dtype and every block size, and which a Hopper GPU runs faster than
FlashAttention 2. The others read the pages through a
transposed view: they take any strides as long as the last dimension is contiguous.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from torch import Tensor

from nanovllm_cli.core.attention_choice import Name, best_first, obstacle
from nanovllm_cli.core.config import AttentionBackendName
from nanovllm_cli.core.errors import UserError
from nanovllm_cli.kernels.prefill_attention import prefill_attention


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedSequences:
    """Queries packed one sequence after the other, and the keys up to each sequence's last query.

    Int32 tensors with a row a sequence, except the two that have one more.
    """

    block_tables: Tensor  # [num_sequences, max_blocks]
    rows: Tensor  # of block_tables: 0, 1, ...
    start_positions: Tensor  # of each sequence's first query
    kv_lens: Tensor
    cu_seqlens_q: Tensor  # [num_sequences + 1]
    cu_seqlens_k: Tensor  # [num_sequences + 1]
    max_query_len: int
    max_kv_len: int


class Prefill(Protocol):
    def __call__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, sequences: PackedSequences
    ) -> Tensor:
        """q: [num_tokens, num_heads, head_dim] -> the same; pages as in KVCache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionBackend:
    """`name` is what `doctor` and the statistics show, with the version where there is one."""

    name: str
    prefill: Prefill


def choose_attention_backend(
    wanted: AttentionBackendName, *, dtype: str, block_size: int, capability: tuple[int, int]
) -> AttentionBackend:
    """The backend `wanted`, for "auto" the best one; raises UserError where it cannot run.

    capability: the GPU's compute capability, (9, 0) of a Hopper.
    """
    if wanted == "auto":
        for name in best_first(capability):
            # Looked at before anything is imported: importing flash-attn takes seconds.
            if obstacle(name, dtype, block_size, capability) is None:
                found = _LOADERS[name]()
                if isinstance(found, AttentionBackend):
                    return found
        raise AssertionError("triton has no obstacle")
    found = find_attention_backend(
        wanted, dtype=dtype, block_size=block_size, capability=capability
    )
    if isinstance(found, str):
        raise UserError(
            f"attention_backend {wanted!r} cannot run: {found}",
            "Without --attention-backend the best one that can run is chosen.",
        )
    return found


def load_attention_backend(name: str) -> AttentionBackend:
    """Return the backend of a name that `choose_attention_backend_name` gave."""
    found = _LOADERS[{"torch-varlen": "torch"}.get(name, name.partition(" ")[0])]()
    assert isinstance(found, AttentionBackend), f"{name} was chosen, and then: {found}"
    return found


def find_attention_backend(
    name: Name,
    *,
    dtype: str,
    block_size: int,
    capability: tuple[int, int],
) -> AttentionBackend | str:
    """The backend, or why it cannot run."""
    found = _LOADERS[name]()
    if isinstance(found, str):
        return found
    return obstacle(name, dtype, block_size, capability) or found


def attention_backends(
    *, dtype: str, block_size: int, capability: tuple[int, int]
) -> dict[str, AttentionBackend | str]:
    """Every backend by its flag's value, the best first: itself, or why it cannot run."""
    return {
        name: find_attention_backend(
            name, dtype=dtype, block_size=block_size, capability=capability
        )
        for name in best_first(capability)
    }


def _triton() -> AttentionBackend:
    def prefill(q: Tensor, k_cache: Tensor, v_cache: Tensor, sequences: PackedSequences) -> Tensor:
        return prefill_attention(
            q,
            k_cache,
            v_cache,
            sequences.block_tables,
            sequences.rows,
            sequences.cu_seqlens_q,
            sequences.start_positions,
            sequences.max_query_len,
        )

    return AttentionBackend(name="triton", prefill=prefill)


def _flash_attn_3() -> AttentionBackend | str:
    # Of its functions only this one takes pages; a packed q it takes with cu_seqlens_q.
    function = _paged_function("flash_attn_interface", "flash_attn_with_kvcache", "page_table")
    if isinstance(function, str):
        return function

    def prefill(q: Tensor, k_cache: Tensor, v_cache: Tensor, sequences: PackedSequences) -> Tensor:
        return function(
            q,
            k_cache.transpose(1, 2),
            v_cache.transpose(1, 2),
            cache_seqlens=sequences.kv_lens,
            page_table=sequences.block_tables,
            cu_seqlens_q=sequences.cu_seqlens_q,
            max_seqlen_q=sequences.max_query_len,
            softmax_scale=q.shape[-1] ** -0.5,
            causal=True,
        )

    return AttentionBackend(name="flash-attn-3", prefill=prefill)


def _flash_attn_2() -> AttentionBackend | str:
    function = _paged_function("flash_attn", "flash_attn_varlen_func", "block_table")
    if isinstance(function, str):
        return function

    def prefill(q: Tensor, k_cache: Tensor, v_cache: Tensor, sequences: PackedSequences) -> Tensor:
        return function(
            q,
            k_cache.transpose(1, 2),
            v_cache.transpose(1, 2),
            cu_seqlens_q=sequences.cu_seqlens_q,
            cu_seqlens_k=sequences.cu_seqlens_k,
            max_seqlen_q=sequences.max_query_len,
            max_seqlen_k=sequences.max_kv_len,
            softmax_scale=q.shape[-1] ** -0.5,
            causal=True,
            block_table=sequences.block_tables,
        )

    version = getattr(importlib.import_module("flash_attn"), "__version__", "2")
    return AttentionBackend(name=f"flash-attn {version}", prefill=prefill)


def _torch_varlen() -> AttentionBackend | str:
    # It came with one version and its pages with a later one: the signature says what there is.
    function = _paged_function("torch.nn.attention.varlen", "varlen_attn", "block_table")
    if isinstance(function, str):
        return function

    def prefill(q: Tensor, k_cache: Tensor, v_cache: Tensor, sequences: PackedSequences) -> Tensor:
        return function(
            q,
            k_cache.transpose(1, 2),
            v_cache.transpose(1, 2),
            sequences.cu_seqlens_q,
            sequences.cu_seqlens_k,
            sequences.max_query_len,
            sequences.max_kv_len,
            scale=q.shape[-1] ** -0.5,
            window_size=(-1, 0),  # causal
            enable_gqa=True,
            seqused_k=sequences.kv_lens,
            block_table=sequences.block_tables,
        )

    return AttentionBackend(name="torch-varlen", prefill=prefill)


_LOADERS: dict[str, Callable[[], AttentionBackend | str]] = {
    "flash-attn-3": _flash_attn_3,
    "flash-attn": _flash_attn_2,
    "torch": _torch_varlen,
    "triton": _triton,
}


def _paged_function(module_name: str, name: str, pages: str) -> Callable[..., Any] | str:
    """The function, or why it is of no use: its parameter `pages` must be there."""
    module = _import(module_name)
    if isinstance(module, str):
        return module
    function: Callable[..., Any] | None = getattr(module, name, None)
    if function is None:
        return f"{module_name} has no {name}"
    if pages not in inspect.signature(function).parameters:
        return f"{module_name}.{name} has no {pages}"
    return function


def _import(name: str) -> ModuleType | str:
    """An optional module, or why it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and name.startswith(error.name):
            return "it is not installed"
        return f"its import fails: {error}"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        # Built for another torch: a symbol is missing.
        return f"its import fails: {(str(error) or repr(error)).splitlines()[0]}"
