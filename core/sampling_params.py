"""SamplingParams: how one sequence's tokens are chosen. Imports nothing, for a quick `--help`."""

from dataclasses import dataclass

MAX_STOP_TOKEN_IDS = 16  # eos ids included: the width of the slot table's column
MAX_LOGPROBS = 20  # OpenAI's and vLLM's limit too
MAX_LOGIT_BIAS = 300  # OpenAI's limit too
MAX_BAD_WORDS = 64
MAX_BAD_WORD_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How one sequence's tokens are chosen; names and meanings as in vLLM.

    Raises ValueError, naming the field, its value and its limit.
    """

    temperature: float = 1.0  # 0 (and below 1e-5) is greedy
    top_k: int | None = None  # None: every token
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_tokens: int | None = None  # None: up to max_model_len
    min_tokens: int = 0  # no stop token before so many tokens
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    # What follows changes logits before a token is chosen, in this order: bias and bad words, then
    # the penalties, as in vLLM and transformers.
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids that must not come one after the other
    repetition_penalty: float = 1.0  # on tokens of the prompt and the completion
    presence_penalty: float = 0.0  # once on tokens of the completion
    frequency_penalty: float = 0.0  # on tokens of the completion, as often as they are there
    thinking_budget: int | None = None  # completion tokens after which end_think_token_id is forced
    end_think_token_id: int | None = None  # unless it has come before
    grammar: str | None = None  # llguidance's: what the completion must be
    grammar_after_token_id: int | None = None  # the grammar begins after this token; None: at once
    # Natural logarithms of the softmax of the model's own logits, before all of the above.
    logprobs: int | None = None  # of each generated token, and of so many likeliest beside it
    prompt_logprobs: int | None = None  # the same of the prompt's tokens
    prompt_logprobs_start: int = 1  # of those from this position on; the first has none

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0 <= self.temperature <= 100.0, "0 to 100")
        _check("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1")
        _check("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0, at most 1")
        _check("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "0 to 1")
        _check("seed", self.seed, 0 <= self.seed < 2**64, "0 to 2**64 - 1")
        limit = self.max_tokens is None or self.max_tokens >= 1
        _check("max_tokens", self.max_tokens, limit, "at least 1")
        most = self.max_tokens if self.max_tokens is not None else self.min_tokens
        _check("min_tokens", self.min_tokens, 0 <= self.min_tokens <= most, "0 to max_tokens")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0.0 < penalty <= 100.0, "above 0, at most 100")
        for name in ("presence_penalty", "frequency_penalty"):
            penalty = getattr(self, name)
            _check(name, penalty, -2.0 <= penalty <= 2.0, "-2 to 2")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            _check(name, count, count is None or 0 <= count <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}")
        start = self.prompt_logprobs_start
        _check("prompt_logprobs_start", start, start >= 1, "at least 1")
        budget = self.thinking_budget
        _check("thinking_budget", budget, budget is None or budget >= 0, "at least 0")
        has_end = budget is None or self.end_think_token_id is not None
        _check("end_think_token_id", None, has_end, "there where thinking_budget is")
        for token_id, bias in self.logit_bias:
            _check(f"logit_bias of {token_id}", bias, -100.0 <= bias <= 100.0, "-100 to 100")
        count = len(self.logit_bias)
        is_once = len({token_id for token_id, _ in self.logit_bias}) == count
        _check("logit_bias", self.logit_bias, is_once, "one bias a token")
        _check("the length of logit_bias", count, count <= MAX_LOGIT_BIAS, f"0 to {MAX_LOGIT_BIAS}")
        count = len(self.bad_words)
        _check("the number of bad_words", count, count <= MAX_BAD_WORDS, f"0 to {MAX_BAD_WORDS}")
        for word in self.bad_words:
            is_short = 1 <= len(word) <= MAX_BAD_WORD_TOKENS
            _check("the tokens of a bad word", len(word), is_short, f"1 to {MAX_BAD_WORD_TOKENS}")

    @property
    def adjusts_logits(self) -> bool:
        """Whether anything but a grammar changes logits: the device sees to that by itself."""
        return bool(
            self.logit_bias
            or self.bad_words
            or self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.thinking_budget is not None
        )


def _check(name: str, value: object, is_good: bool, limit: str) -> None:
    if not is_good:
        raise ValueError(f"{name} is {value}; it must be {limit}")
