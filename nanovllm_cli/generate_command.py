"""`nanovllm generate`: its flags -> GenerateOptions -> the job."""

from pathlib import Path
from typing import Any

import typer

from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.core.errors import UserError

from . import flags
from .exit_code import ExitCode
from .lock import output_locks
from .log import Log
from .options import GenerateOptions
from .prompt_options import PromptOptions
from .run_job import run_job
from .settings import load_config_file, option
from .shard import Shard
from .signals import Signals
from .structured_output import grammar_of_flags

_OUTPUT, _PROMPTS, _SAMPLING = "Output", "Prompts", "Sampling (a row's own fields come first)"


def generate_command(
    inputs: list[str] = typer.Argument(
        ...,
        metavar="INPUT...",
        help="JSONL or Parquet files (also .gz, .zst), globs, directories, or - for stdin.",
    ),
    output: str = option(
        "-", "--output", "-o", panel=_OUTPUT, metavar="FILE",
        help="JSONL (also .gz, .zst) or Parquet by its extension; - is stdout.",
    ),
    format: str = option(
        "auto", "--format", panel=_OUTPUT, metavar="auto|openai",
        help="openai: every row as an OpenAI batch line; auto: those that came as one.",
    ),
    errors: str | None = option(
        None, "--errors", panel=_OUTPUT, metavar="FILE",
        help="Failed rows; - is stderr. Default: OUTPUT.errors.jsonl, or stderr.",
    ),
    overwrite: bool = option(
        False, "--overwrite", panel=_OUTPUT,
        help="Replace OUTPUT when the job is done, whosever it is; a finished job runs again.",
    ),
    restart: bool = option(
        False, "--restart", panel=_OUTPUT,
        help="Discard what an earlier run has done, and run every row again.",
    ),
    retry_failed: bool = option(
        False, "--retry-failed", panel=_OUTPUT,
        help="Run the rows again that failed in an earlier run.",
    ),
    private: bool = option(
        False, "--private", panel=_OUTPUT, help="Files that only you can read (mode 0600)."
    ),
    unordered: bool = option(
        False, "--unordered", panel=_OUTPUT, help="On stdout: rows as they finish."
    ),
    template: str | None = option(
        None, "--template", "-p", panel=_PROMPTS, metavar="TEXT",
        help="Build the prompt from columns: 'Translate: {text}'.",
    ),
    system: str | None = option(
        None, "--system", panel=_PROMPTS, metavar="TEXT",
        help="A system message before each chat that has none.",
    ),
    chat: bool = option(
        False, "--chat", panel=_PROMPTS, help="Make a prompt a user message, not a raw completion."
    ),
    thinking: bool | None = option(
        None, "--thinking/--no-thinking", panel=_PROMPTS,
        help="Whether the model thinks before it answers; default: the template's.",
    ),
    prompt_column: str = option(
        "prompt", "--prompt-column", panel=_PROMPTS, metavar="NAME", help="Where prompts are."
    ),
    messages_column: str = option(
        "messages", "--messages-column", panel=_PROMPTS, metavar="NAME", help="Where chats are."
    ),
    id_column: str | None = option(
        None, "--id-column", panel=_PROMPTS, metavar="NAME", help="Default: id or custom_id."
    ),
    parse_special: bool = option(
        False, "--parse-special", panel=_PROMPTS,
        help="Let <|im_start|> and the like in raw prompts be control tokens.",
    ),
    temperature: float | None = option(
        None, "--temperature", panel=_SAMPLING, help="0 is greedy. Default: the model's."
    ),
    top_p: float | None = option(
        None, "--top-p", panel=_SAMPLING, help="Draw from the likeliest tokens of this mass."
    ),
    top_k: int | None = option(
        None, "--top-k", panel=_SAMPLING, help="Draw from so many tokens; 0 is all."
    ),
    min_p: float | None = option(
        None, "--min-p", panel=_SAMPLING, help="Drop tokens below this share of the likeliest."
    ),
    max_tokens: int | None = option(
        None, "--max-tokens", panel=_SAMPLING,
        help="Completion tokens at most; default: up to the model's limit.",
    ),
    min_tokens: int | None = option(
        None, "--min-tokens", panel=_SAMPLING, help="No stop token before so many."
    ),
    stop: list[str] = option(
        [], "--stop", panel=_SAMPLING, metavar="TEXT", help="End before this text; repeatable."
    ),
    ignore_eos: bool = option(
        False, "--ignore-eos", panel=_SAMPLING, help="Generate on after the end of the text."
    ),
    json_schema: str | None = option(
        None, "--json-schema", panel=_SAMPLING, metavar="FILE",
        help="Completions are JSON of this schema.",
    ),
    regex: str | None = option(
        None, "--regex", panel=_SAMPLING, metavar="TEXT",
        help="Completions match this regular expression, from their beginning to their end.",
    ),
    choice: str | None = option(
        None, "--choice", panel=_SAMPLING, metavar="A,B,...", help="Completions are one of these."
    ),
    grammar: str | None = option(
        None, "--grammar", panel=_SAMPLING, metavar="FILE",
        help="Completions are of this grammar, in Lark's notation or GBNF.",
    ),
    n: int = option(1, "--n", panel=_SAMPLING, help="Completions for each row."),
    seed: int = option(0, "--seed", panel=_SAMPLING, help="Two runs with one seed are the same."),
    model: flags.Model = GenerateOptions.model,
    revision: str | None = option(
        None, "--revision", panel=flags.MODEL, help="Branch, tag or commit."
    ),
    tokenizer: str | None = option(
        None, "--tokenizer", panel=flags.MODEL, metavar="NAME", help="Default: the model's own."
    ),
    dtype: flags.DType = flags.DEFAULTS.dtype,
    offline: bool = option(
        False, "--offline", panel=flags.MODEL, help="Never ask the hub; as HF_HUB_OFFLINE=1."
    ),
    max_model_len: flags.MaxModelLen = None,
    device: flags.Device = flags.DEFAULTS.device,
    tensor_parallel_size: flags.TensorParallelSize = flags.DEFAULTS.tensor_parallel_size,
    data_parallel_size: flags.DataParallelSize = GenerateOptions.data_parallel_size,
    max_num_seqs: flags.MaxNumSeqs = None,
    max_num_batched_tokens: flags.MaxNumBatchedTokens = None,
    gpu_memory_utilization: flags.GpuMemoryUtilization = flags.DEFAULTS.gpu_memory_utilization,
    enforce_eager: flags.EnforceEager = False,
    block_size: flags.BlockSize = flags.DEFAULTS.block_size,
    attention_backend: flags.AttentionBackend = flags.DEFAULTS.attention_backend,
    kv_cache_memory: float | None = option(
        None, "--kv-cache-memory", panel=flags.ENGINE, metavar="GIB",
        help="Default: what the job needs.",
    ),
    no_prefix_caching: flags.NoPrefixCaching = False,
    max_inflight: int | None = option(
        None, "--max-inflight", panel=flags.ENGINE, metavar="ROWS",
        help="Rows read ahead of the output; default: 4 x max-num-seqs for each engine, or 4096.",
    ),
    limit: int | None = option(
        None, "--limit", panel=flags.RUN, metavar="ROWS", min=1, help="Only the first rows."
    ),
    dry_run: bool = option(
        False, "--dry-run", panel=flags.RUN,
        help="Read and tokenize everything, report, and generate nothing.",
    ),
    allow_errors: bool = option(
        False, "--allow-errors", panel=flags.RUN, help="Exit 0 though some rows failed."
    ),
    max_error_rate: float | None = option(
        None, "--max-error-rate", panel=flags.RUN, metavar="0..1",
        help="Stop where, of 100 rows or more, a larger share failed.",
    ),
    shard: str = option(
        "1/1", "--shard", panel=flags.RUN, metavar="i/N",
        help="Every N-th row from the i-th on; `nanovllm merge` puts 1/N to N/N together.",
    ),
    wait_lock: float = option(
        0.0, "--wait-lock", panel=flags.RUN, metavar="SECONDS",
        help="Wait so long for another run that writes OUTPUT.",
    ),
    timeout: float | None = option(
        None, "--timeout", panel=flags.RUN, metavar="SECONDS",
        help="End after so long with what is done kept, exit code 75; the same line goes on.",
    ),
    quiet: bool = option(
        False, "--quiet", "-q", panel=flags.RUN, help="Silent unless something fails."
    ),
    log_format: str = option(
        "text", "--log-format", panel=flags.RUN, metavar="text|json",
        help="Of stderr; json: one object a line.",
    ),
    metrics_file: str | None = option(
        None, "--metrics-file", panel=flags.RUN, metavar="FILE",
        help="Keep the totals here, in Prometheus' text format.",
    ),
    single_process: bool = option(
        False, "--single-process", panel=flags.RUN,
        help="The engine in this process, for debugging: its death is the job's.",
    ),
    debug: flags.Debug = False,
    config: Path | None = typer.Option(
        None, "--config", rich_help_panel=flags.RUN, metavar="FILE", envvar="NANOVLLM_CONFIG",
        is_eager=True, callback=load_config_file, show_envvar=False,
        help="A TOML file with any of these flags; flags and NANOVLLM_... come first.",
    ),
) -> None:  # fmt: skip
    """Complete every row of INPUT.

    [bold]nanovllm generate prompts.jsonl -o out.jsonl[/bold]

    A row is {"prompt": ...}, {"messages": [...]}, {"prompt_token_ids": [...]} or an OpenAI batch
    line. Its other columns travel through to the output. Each flag is also an environment
    variable: --max-tokens is NANOVLLM_MAX_TOKENS.
    """

    signals = Signals()

    def job() -> ExitCode:
        if kv_cache_memory is not None and not 0 < kv_cache_memory < float("inf"):
            raise UserError(f"--kv-cache-memory is {kv_cache_memory}; it must be above 0")
        chosen = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "max_tokens": max_tokens,
            "min_tokens": min_tokens,
            "ignore_eos": ignore_eos or None,
            "grammar": grammar_of_flags(
                json_schema=json_schema, regex=regex, choice=choice, grammar=grammar
            ),
        }
        sampling: dict[str, Any] = {
            name: value for name, value in chosen.items() if value is not None
        }
        if top_k in (-1, 0):
            sampling["top_k"] = None  # over the model's default
        options = GenerateOptions(
            inputs=inputs,
            output=output,
            format=format,
            errors=errors,
            model=model,
            revision=revision,
            tokenizer=tokenizer,
            offline=offline,
            engine=EngineConfig(
                dtype=dtype,  # type: ignore[arg-type]  # checked by EngineConfig
                max_model_len=max_model_len,
                device=device,  # type: ignore[arg-type]  # likewise
                tensor_parallel_size=tensor_parallel_size,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                block_size=block_size,
                gpu_memory_utilization=gpu_memory_utilization,
                enforce_eager=enforce_eager,
                attention_backend=attention_backend,  # type: ignore[arg-type]  # likewise
                kv_cache_bytes=None if kv_cache_memory is None else int(kv_cache_memory * 2**30),
                enable_prefix_caching=not no_prefix_caching,
            ),
            prompt=PromptOptions(
                chat=chat,
                template=template,
                system=system,
                enable_thinking=thinking,
                prompt_column=prompt_column,
                messages_column=messages_column,
                id_column=id_column,
            ),
            sampling=sampling,
            n=n,
            stop=tuple(stop),
            seed=seed,
            parse_special=parse_special,
            unordered=unordered,
            overwrite=overwrite,
            restart=restart,
            retry_failed=retry_failed,
            private=private,
            wait_lock=wait_lock,
            shard=Shard.parse(shard),
            max_error_rate=max_error_rate,
            allow_errors=allow_errors,
            limit=limit,
            data_parallel_size=data_parallel_size,
            max_inflight=max_inflight,
            quiet=quiet,
            timeout=timeout,
            log_format=log_format,
            metrics_file=metrics_file,
        )
        if timeout is not None:
            signals.end_after(timeout)
        if dry_run:
            from .dry_run import dry_run as run

            return run(options)
        with output_locks(options):
            if single_process:
                if data_parallel_size > 1:
                    raise UserError(
                        f"--data-parallel-size is {data_parallel_size}, with --single-process",
                        "Leave out one of them: each engine needs a process.",
                    )
                from .pipeline import generate

                return generate(options, signals=signals)
            from nanovllm_cli.core.device_shares import start_children  # imports numpy

            # They import torch while this process imports what it needs.
            children = start_children(data_parallel_size, tensor_parallel_size)
            try:
                from .pipeline import generate_supervised

                return generate_supervised(options, children, signals)
            finally:
                for child in children:
                    child.kill()  # nothing is left to kill where the job has closed it

    raise typer.Exit(run_job(job, debug=debug, log=Log(log_format), signals=signals))
