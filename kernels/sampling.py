"""Choose the next token: greedy, or a draw by the Gumbel-max trick with counter-based noise.

argmax over the kept tokens of logit / temperature + g, with g = -log(-log(u)). The uniform u of a
token depends on the sequence's seed, the position and the token id alone (Philox 4x32-7, Salmon et
al. 2011, https://doi.org/10.1145/2063384.2063405), so a draw does not depend on the batch, the
slot, the window or the ranks. Ties go to the lowest token id. Seven rounds are the fewest that the
paper found to pass all tests of BigCrush; each costs a GPU's sampler 3 % of its time.

The filters are transformers' in its order: top_k, then top_p over what is left, then min_p.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
PHILOX_ROUNDS = 7
MIN_TEMPERATURE = 1e-5  # below it, 0 included, is greedy; vLLM's limit too
LANE_TOKENS = 1024  # one counter serves four tokens, 1024 apart


def sample_reference(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """The next token of each row: int64 [num_rows].

    logits: [num_rows, vocab_size]; temperature, top_p, min_p: fp32 [num_rows]; top_k
    (vocab_size keeps all), position (of the token to choose), seed (64 bits): int64 [num_rows].
    """
    token_ids = logits.argmax(dim=-1)
    drawn = torch.nonzero(temperature >= MIN_TEMPERATURE).squeeze(1)
    if len(drawn):
        scaled = logits[drawn].float() / temperature[drawn].unsqueeze(1)
        kept_ids, kept = _filter(scaled, top_k[drawn], top_p[drawn], min_p[drawn])
        noisy = kept + gumbel_noise_reference(kept_ids, seed[drawn], position[drawn])
        is_best = noisy == noisy.amax(dim=-1, keepdim=True)
        token_ids[drawn] = kept_ids.masked_fill(~is_best, logits.shape[1]).amin(dim=-1)
    return token_ids


def _filter(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """The candidates: token ids [num_rows, num_candidates] and logits, -inf where filtered out."""
    vocab_size = logits.shape[1]
    if bool(((top_k >= vocab_size) & (top_p >= 1) & (min_p <= 0)).all()):
        return torch.arange(vocab_size).expand_as(logits), logits
    num_candidates = int(top_k.max())
    if num_candidates < vocab_size:
        # Whoever ties with the last of the top_k is a candidate too; the sort below decides.
        least = logits.topk(num_candidates, dim=-1).values.gather(1, top_k.unsqueeze(1) - 1)
        num_candidates = int((logits >= least).sum(dim=-1).max())
        ids = logits.topk(num_candidates, dim=-1).indices.sort(dim=-1).values
    else:
        ids = torch.arange(vocab_size).expand_as(logits)
    candidates, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    candidates = candidates.masked_fill(
        torch.arange(num_candidates) >= top_k.unsqueeze(1), -torch.inf
    )
    probabilities = torch.exp(candidates - candidates[:, :1])
    # A running sum's last entry, not sum(): the zeros of a wider batch must not regroup it.
    cumulative = probabilities.cumsum(dim=-1)
    dropped = cumulative - probabilities >= top_p.unsqueeze(1) * cumulative[:, -1:]
    dropped &= (top_p < 1).unsqueeze(1)  # all of it, whatever the sum's rounding
    dropped |= probabilities < min_p.unsqueeze(1)
    dropped[:, 0] = False
    return ids, candidates.masked_fill(dropped, -torch.inf)


def gumbel_noise_reference(token_ids: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """Standard Gumbel noise of tokens: fp32 [num_rows, num_tokens].

    token_ids: int64 [num_rows, num_tokens]; seed, position: int64 [num_rows].
    """
    group, within = token_ids // (4 * LANE_TOKENS), token_ids % (4 * LANE_TOKENS)
    counter = group * LANE_TOKENS + within % LANE_TOKENS
    words = torch.stack(philox_reference(counter, position.unsqueeze(1), seed.unsqueeze(1)))
    word = words.gather(0, (within // LANE_TOKENS).unsqueeze(0)).squeeze(0)
    uniform = ((word.double() + 0.5) * 2.0**-32).float().clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def philox_reference(counter: Tensor, position: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    """Philox 4x32-7 of the counter (counter, position, 0, 0) and the key `seed`: four words."""
    c0, c1 = counter & _MASK, (position & _MASK).expand_as(counter)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(PHILOX_ROUNDS):
        low0, high0 = _multiply(c0, 0xD2511F53)
        low1, high1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The low and the high word of a 32-bit product; int64 wraps, its bits are right."""
    product = a * b
    return product & _MASK, (product >> 32) & _MASK
