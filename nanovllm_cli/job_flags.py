"""The flags that `generate` and `score` share: files, columns, and how a job runs."""

from pathlib import Path
from typing import Annotated

import typer

from . import flags
from .settings import load_config_file, shared_option

OUTPUT, PROMPTS = "Output", "Prompts"

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...",
        help="JSONL or Parquet files (also .gz, .zst), globs, directories, or - for stdin.",
    ),
]
Output = Annotated[
    str,
    shared_option(
        "--output", "-o", panel=OUTPUT, metavar="FILE",
        help="JSONL (also .gz, .zst) or Parquet by its extension; - is stdout.",
    ),
]  # fmt: skip
OutputColumns = Annotated[
    str | None,
    shared_option(
        "--output-columns", panel=OUTPUT, metavar="A,B,...",
        help="These columns in this order, of the input's and the results.",
    ),
]  # fmt: skip
Errors = Annotated[
    str | None,
    shared_option(
        "--errors", panel=OUTPUT, metavar="FILE",
        help="Failed rows; - is stderr. Default: OUTPUT.errors.jsonl, or stderr.",
    ),
]  # fmt: skip
Overwrite = Annotated[
    bool,
    shared_option(
        "--overwrite", panel=OUTPUT,
        help="Replace OUTPUT when the job is done, even another tool's; a finished job runs again.",
    ),
]  # fmt: skip
Restart = Annotated[
    bool,
    shared_option(
        "--restart", panel=OUTPUT,
        help="Discard what an earlier run has done, and run every row again.",
    ),
]  # fmt: skip
RetryFailed = Annotated[
    bool,
    shared_option(
        "--retry-failed", panel=OUTPUT, help="Run the rows again that failed in an earlier run."
    ),
]
Private = Annotated[
    bool, shared_option("--private", panel=OUTPUT, help="Files that only you can read (mode 0600).")
]
Unordered = Annotated[
    bool, shared_option("--unordered", panel=OUTPUT, help="On stdout: rows as they finish.")
]
PromptColumn = Annotated[
    str, shared_option("--prompt-column", panel=PROMPTS, metavar="NAME", help="Where prompts are.")
]
MessagesColumn = Annotated[
    str, shared_option("--messages-column", panel=PROMPTS, metavar="NAME", help="Where chats are.")
]
IdColumn = Annotated[
    str | None,
    shared_option("--id-column", panel=PROMPTS, metavar="NAME", help="Default: id or custom_id."),
]
ParseSpecial = Annotated[
    bool,
    shared_option(
        "--parse-special", panel=PROMPTS,
        help="Let <|im_start|> and the like in raw prompts be control tokens.",
    ),
]  # fmt: skip
Revision = Annotated[
    str | None, shared_option("--revision", panel=flags.MODEL, help="Branch, tag or commit.")
]
Tokenizer = Annotated[
    str | None,
    shared_option(
        "--tokenizer", panel=flags.MODEL, metavar="NAME", help="Default: the model's own."
    ),
]
Offline = Annotated[
    bool,
    shared_option("--offline", panel=flags.MODEL, help="Never ask the hub; as HF_HUB_OFFLINE=1."),
]
VerifyWeights = Annotated[
    bool,
    shared_option(
        "--verify-weights", panel=flags.MODEL,
        help="Resume only where every byte of the weights is the same, not a sample of them.",
    ),
]  # fmt: skip
KvCacheMemory = Annotated[
    float | None,
    shared_option(
        "--kv-cache-memory", panel=flags.ENGINE, metavar="GIB", help="Default: what the job needs."
    ),
]
MaxInflight = Annotated[
    int | None,
    shared_option(
        "--max-inflight", panel=flags.ENGINE, metavar="ROWS",
        help="Rows read ahead of the output; default: 4 x max-num-seqs for each engine, or 4096.",
    ),
]  # fmt: skip
Limit = Annotated[
    int | None,
    shared_option("--limit", panel=flags.RUN, metavar="ROWS", min=1, help="Only the first rows."),
]
DryRun = Annotated[
    bool,
    shared_option(
        "--dry-run", panel=flags.RUN,
        help="Read and tokenize everything, report, and run no engine.",
    ),
]  # fmt: skip
AllowErrors = Annotated[
    bool, shared_option("--allow-errors", panel=flags.RUN, help="Exit 0 though some rows failed.")
]
MaxErrorRate = Annotated[
    float | None,
    shared_option(
        "--max-error-rate", panel=flags.RUN, metavar="0..1",
        help="Stop if a larger share failed, once 100 rows or more are taken.",
    ),
]  # fmt: skip
Shard = Annotated[
    str,
    shared_option(
        "--shard", panel=flags.RUN, metavar="i/N",
        help="Every N-th row from the i-th on; `nanovllm merge` puts 1/N to N/N together.",
    ),
]  # fmt: skip
WaitLock = Annotated[
    float,
    shared_option(
        "--wait-lock", panel=flags.RUN, metavar="SECONDS",
        help="How long to wait for another run that writes OUTPUT.",
    ),
]  # fmt: skip
Timeout = Annotated[
    float | None,
    shared_option(
        "--timeout", panel=flags.RUN, metavar="SECONDS",
        help="Stop after this long and keep what is done, exit code 75; the same line goes on.",
    ),
]  # fmt: skip
Quiet = Annotated[
    bool, shared_option("--quiet", "-q", panel=flags.RUN, help="Silent unless something fails.")
]
LogFormat = Annotated[
    str,
    shared_option(
        "--log-format", panel=flags.RUN, metavar="text|json",
        help="Format of stderr; json: one object a line.",
    ),
]  # fmt: skip
MetricsFile = Annotated[
    str | None,
    shared_option(
        "--metrics-file", panel=flags.RUN, metavar="FILE",
        help="Keep the totals here, in Prometheus' text format.",
    ),
]  # fmt: skip
SingleProcess = Annotated[
    bool,
    shared_option(
        "--single-process", panel=flags.RUN,
        help="The engine in this process, for debugging: its death is the job's.",
    ),
]  # fmt: skip
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", rich_help_panel=flags.RUN, metavar="FILE", envvar="NANOVLLM_CONFIG",
        is_eager=True, callback=load_config_file, show_envvar=False,
        help="A TOML file with any of these flags; flags and NANOVLLM_... come first.",
    ),
]  # fmt: skip
