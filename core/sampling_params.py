"""SamplingParams: how one sequence's tokens are chosen. Imports nothing, for a quick `--help`."""

from dataclasses import dataclass

MAX_STOP_TOKEN_IDS = 16  # eos ids included: the width of the slot table's column


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


def _check(name: str, value: object, is_good: bool, limit: str) -> None:
    if not is_good:
        raise ValueError(f"{name} is {value}; it must be {limit}")
