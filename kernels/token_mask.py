"""Only some tokens may be drawn: the logits of the others become minus infinity."""

import torch
from torch import Tensor

from nanovllm_cli.kernels.penalties import unpack_bits
from nanovllm_cli.kernels.triton_import import runs_on_triton, tl, triton

_TILE_TOKENS = 4096


def mask_tokens_reference(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    """Mask some rows of logits: [num_rows, vocab_size], in place.

    rows: int [num_masks]; words: int32 [num_masks, ceil(vocab_size / 32)]; bit i of word w is token
    32 * w + i, 1 is allowed.
    """
    is_allowed = unpack_bits(words, logits.shape[1])
    rows = rows.long()
    logits[rows] = logits[rows].masked_fill(~is_allowed, -torch.inf)


@triton.jit
def mask_tokens_kernel(
    logits_ptr, rows_ptr, words_ptr, logits_stride, num_words, vocab_size, TILE: tl.constexpr
):
    """One program: TILE tokens of one row. What is allowed is neither read nor written."""
    mask_index = tl.program_id(1).to(tl.int64)
    row = tl.load(rows_ptr + mask_index).to(tl.int64)
    ids = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_token = ids < vocab_size
    word = tl.load(words_ptr + mask_index * num_words + ids // 32, mask=is_token, other=-1)
    is_banned = is_token & (((word >> (ids % 32)) & 1) == 0)
    banned = tl.full([TILE], float("-inf"), tl.float32).to(logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + row * logits_stride + ids, banned, mask=is_banned)


def mask_tokens(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    """`mask_tokens_reference`, on a GPU by a program for each row and tile of tokens."""
    vocab_size = logits.shape[1]
    num_words = -(-vocab_size // 32)
    assert words.shape == (len(rows), num_words), f"masks are {tuple(words.shape)}"
    if not runs_on_triton(logits):
        mask_tokens_reference(logits, rows, words)
        return
    assert logits.stride(1) == 1, f"logits have strides {logits.stride()}"
    assert words.is_contiguous(), "masks are not contiguous"
    mask_tokens_kernel[(triton.cdiv(vocab_size, _TILE_TOKENS), len(rows))](
        logits, rows, words, logits.stride(0), num_words, vocab_size, TILE=_TILE_TOKENS
    )
