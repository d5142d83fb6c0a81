"""Gumbel noise of tokens: -log(-log1p(-u)), with u of Philox 4x32-7's words.

A token's u depends on the sequence's seed, the position and the token id alone (Salmon et al. 2011,
https://doi.org/10.1145/2063384.2063405). A counter gives four words, for four tokens LANE_TOKENS
apart in a group of 4 * LANE_TOKENS. Its meaning is sampling.py's gumbel_noise_reference.
"""

from nanovllm_cli.kernels.sampling import PHILOX_ROUNDS
from nanovllm_cli.kernels.triton_import import tl, triton


@triton.jit
def words_of_counters(seed, position, counter, ROUNDS: tl.constexpr = PHILOX_ROUNDS):
    """Philox of (counter, position, 0, 0): four uint32 words, of tokens with ascending ids.

    As tl.philox, but its products are 64 bits wide: one instruction each on a GPU, not two.
    """
    key0 = (seed.to(tl.uint64) & 0xFFFFFFFF).to(tl.uint32)
    key1 = (seed.to(tl.uint64) >> 32).to(tl.uint32)
    c0 = counter.to(tl.uint32)
    c2 = c0 * 0
    c1 = c2 + position.to(tl.uint32)
    c3 = c2
    for _ in tl.static_range(ROUNDS):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def log2(x, FAST: tl.constexpr):
    """Base 2. FAST is the GPU's own instruction, good to 2^-22, absolute, around x = 1."""
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def negative_noise(word, FAST: tl.constexpr):
    """Minus the noise, over ln(2), plus a constant, log(ln(2)) / ln(2); fp32, to about 1e-5.

    u = (word + 0.5) / 2^32, word: uint32. A small u makes a large noise, which is the one that
    wins: there log1p is its series.
    """
    uniform = word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    uniform = tl.minimum(uniform, 0.99999994)
    # u + u^2 / 2 + u^3 / 3, over ln(2), as log2 is.
    series = uniform * 0.4808983469629878 + 0.7213475204444817
    series = uniform * (uniform * series + 1.4426950408889634)
    waiting = tl.where(uniform < 0.015625, series, log2(1.0 - uniform, FAST))
    return log2(tl.abs(waiting), FAST)


@triton.jit
def noise_of_tokens(seed, position, token_ids, LANE_TOKENS: tl.constexpr, FAST: tl.constexpr):
    """The noise of single tokens, less the same constant; fp32."""
    lane = token_ids // LANE_TOKENS % 4
    counter = token_ids // (4 * LANE_TOKENS) * LANE_TOKENS + token_ids % LANE_TOKENS
    w0, w1, w2, w3 = words_of_counters(seed, position, counter)
    word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return 0.0 - negative_noise(word, FAST) * 0.6931471805599453
