"""GenerateOptions: everything a job of `generate` or `score` can be told, with every default."""

from dataclasses import dataclass, field
from typing import Any

from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.core.errors import UserError
from nanovllm_cli.core.sampling_params import MAX_BAD_WORDS, SamplingParams

from .log import FORMATS
from .output_columns import RESULT_COLUMNS, SCORE_COLUMNS, OutputColumns
from .output_format import check_output_name
from .prompt_options import PromptOptions
from .setting_values import MAX_SAMPLES, is_bad_words
from .shard import Shard

DEFAULT_MODEL = "Qwen3-0.6B"
_BYTES_IN_FLIGHT = 256 << 20  # for each engine
_MAX_TIMEOUT = 100_000_000  # seconds: three years
_MAX_ROWS = 2**63 - 1  # that can be counted


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """One job. What the engine and the prompts can be told is in their own options."""

    inputs: list[str]
    output: str = "-"
    format: str = "auto"  # "openai": every row in OpenAI's shape; "auto": OpenAI's lines only
    output_columns: tuple[str, ...] = ()  # (): the input's and the results
    errors: str | None = None  # None: beside the output
    model: str = DEFAULT_MODEL
    served_model_name: str | None = None  # in OpenAI's lines; None: `model`
    revision: str | None = None
    tokenizer: str | None = None  # None: the model's
    offline: bool = False
    verify_weights: bool = False  # every byte of them is part of the fingerprint
    engine: EngineConfig = field(default_factory=EngineConfig)
    prompt: PromptOptions = field(default_factory=PromptOptions)
    sampling: dict[str, Any] = field(default_factory=dict)  # over the model's defaults
    generation_config: str = "auto"  # whose sampling defaults; "vllm": none; or a directory
    n: int = 1
    best_of: int | None = None  # samples of which n are kept; None: n
    stop: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    truncate_prompt_tokens: int | None = None  # to the last so many; None: all
    thinking_budget: int | None = None  # tokens; of rows that think
    seed: int = 0
    parse_special: bool = False
    token_logprobs: bool = False  # of a score: a column with each token's
    unordered: bool = False
    overwrite: bool = False
    restart: bool = False  # from the first row, whatever an earlier run has left
    retry_failed: bool = False  # rows that failed in an earlier run
    private: bool = False  # files for their owner alone
    wait_lock: float = 0.0  # seconds for another run on the same output to end
    shard: Shard = field(default_factory=Shard)
    allow_errors: bool = False
    max_error_rate: float | None = None  # stop where more rows fail; None: never
    limit: int | None = None
    data_parallel_size: int = 1  # engines
    max_inflight: int | None = None  # rows; None: four for each that can run at a time
    quiet: bool = False
    timeout: float | None = None  # seconds for the whole job
    log_format: str = "text"  # of stderr; "json": an object a line
    metrics_file: str | None = None

    def __post_init__(self) -> None:
        check_output_name(self.output)
        for name, value, is_good, limit in (
            ("format", self.format, self.format in ("auto", "openai"), "auto or openai"),
            ("n", self.n, 1 <= self.n <= MAX_SAMPLES, f"1 to {MAX_SAMPLES}"),
            (
                "best-of",
                self.best_of,
                self.best_of is None or self.n <= self.best_of <= MAX_SAMPLES,
                f"{self.n} (--n) to {MAX_SAMPLES}",
            ),
            (
                "bad-word",
                self.bad_words,
                is_bad_words([*self.bad_words]),
                f"at most {MAX_BAD_WORDS} texts, none of them blank",
            ),
            (
                "truncate-prompt-tokens",
                self.truncate_prompt_tokens,
                self.truncate_prompt_tokens is None or self.truncate_prompt_tokens >= 1,
                "at least 1",
            ),
            (
                "thinking-budget",
                self.thinking_budget,
                self.thinking_budget is None or self.thinking_budget >= 0,
                "at least 0",
            ),
            ("stop", "''", all(self.stop), "a text that is not empty"),
            ("seed", self.seed, 0 <= self.seed < 2**64, "0 to 2**64 - 1"),
            (
                "limit",
                self.limit,
                self.limit is None or 1 <= self.limit <= _MAX_ROWS,
                f"1 to {_MAX_ROWS}",
            ),
            (
                "max-inflight",
                self.max_inflight,
                self.max_inflight is None or 1 <= self.max_inflight <= _MAX_ROWS,
                f"1 to {_MAX_ROWS}",
            ),
            (
                "data-parallel-size",
                self.data_parallel_size,
                self.data_parallel_size >= 1,
                "at least 1",
            ),
            (
                "wait-lock",
                self.wait_lock,
                0 <= self.wait_lock <= _MAX_TIMEOUT,
                f"0 to {_MAX_TIMEOUT}",
            ),
            (
                "timeout",
                self.timeout,
                self.timeout is None or 0 < self.timeout <= _MAX_TIMEOUT,
                f"above 0 and at most {_MAX_TIMEOUT}",
            ),
            (
                "log-format",
                self.log_format,
                self.log_format in FORMATS,
                " or ".join(FORMATS),
            ),
            (
                "max-error-rate",
                self.max_error_rate,
                self.max_error_rate is None or 0 <= self.max_error_rate <= 1,
                "0 to 1",
            ),
        ):
            if not is_good:
                raise UserError(f"--{name} is {value}; it must be {limit}")
        if self.output_columns and self.format == "openai":
            raise UserError("--output-columns are not of --format openai", "Leave out one of them.")
        try:
            SamplingParams(**self.sampling)
        except ValueError as error:
            raise UserError(f"--{error}".replace("_", "-")) from None

    @property
    def files_written(self) -> tuple[str | None, ...]:
        """The names of the job's outputs, which are no inputs though a directory holds them."""
        return self.output, self.errors, self.metrics_file

    @property
    def columns(self) -> OutputColumns:
        """What a row of the output holds."""
        results = SCORE_COLUMNS if self.prompt.is_score else RESULT_COLUMNS
        return OutputColumns(results=results, chosen=self.output_columns)

    @property
    def shown_model(self) -> str:
        """The name of the model in OpenAI's lines."""
        return self.model if self.served_model_name is None else self.served_model_name

    @property
    def rows_in_flight(self) -> int:
        """Rows that may be tokenized and not yet written.

        Four for each sequence that can run, so that none waits for its prompt. Where that number
        is left to the device, it is a GPU's 1024: only torch, which takes seconds to import, knows
        the device, and on a CPU, which runs 256, more rows cost memory and nothing else.
        """
        in_each = 4 * (self.engine.max_num_seqs or 1024)
        return self.max_inflight or self.data_parallel_size * in_each

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of rows after which no further row is taken before another one is done."""
        return self.data_parallel_size * _BYTES_IN_FLIGHT
