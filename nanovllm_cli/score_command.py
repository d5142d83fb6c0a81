"""`nanovllm score`: its flags -> GenerateOptions of a job that scores -> the job."""

from typing import Any

import typer

from . import flags, job_flags
from .exit_code import ExitCode
from .log import Log
from .options import GenerateOptions
from .output_columns import parse_output_columns
from .prompt_options import PromptOptions
from .run_job import run_job
from .settings import option
from .shard import Shard
from .signals import Signals
from .start_job import start_job

# One token has to be generated, and is dropped.
SAMPLING: dict[str, Any] = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 1}


def score_command(
    inputs: job_flags.Inputs,
    output: job_flags.Output = "-",
    token_logprobs: bool = option(
        False, "--token-logprobs", panel=job_flags.OUTPUT,
        help="A column with the log-probability of each token.",
    ),
    output_columns: job_flags.OutputColumns = None,
    errors: job_flags.Errors = None,
    overwrite: job_flags.Overwrite = False,
    restart: job_flags.Restart = False,
    retry_failed: job_flags.RetryFailed = False,
    private: job_flags.Private = False,
    unordered: job_flags.Unordered = False,
    prompt_column: job_flags.PromptColumn = "prompt",
    messages_column: job_flags.MessagesColumn = "messages",
    context_column: str = option(
        "context", "--context-column", panel=job_flags.PROMPTS, metavar="NAME",
        help="Where the texts are that come first and are not scored.",
    ),
    continuation_column: str = option(
        "continuation", "--continuation-column", panel=job_flags.PROMPTS, metavar="NAME",
        help="Where the texts are that follow a context and are scored.",
    ),
    id_column: job_flags.IdColumn = None,
    parse_special: job_flags.ParseSpecial = False,
    model: flags.Model = GenerateOptions.model,
    revision: job_flags.Revision = None,
    tokenizer: job_flags.Tokenizer = None,
    dtype: flags.DType = flags.DEFAULTS.dtype,
    offline: job_flags.Offline = False,
    verify_weights: job_flags.VerifyWeights = False,
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
    kv_cache_memory: job_flags.KvCacheMemory = None,
    no_prefix_caching: flags.NoPrefixCaching = False,
    max_inflight: job_flags.MaxInflight = None,
    limit: job_flags.Limit = None,
    dry_run: job_flags.DryRun = False,
    allow_errors: job_flags.AllowErrors = False,
    max_error_rate: job_flags.MaxErrorRate = None,
    shard: job_flags.Shard = "1/1",
    wait_lock: job_flags.WaitLock = 0.0,
    timeout: job_flags.Timeout = None,
    quiet: job_flags.Quiet = False,
    log_format: job_flags.LogFormat = "text",
    metrics_file: job_flags.MetricsFile = None,
    single_process: job_flags.SingleProcess = False,
    debug: flags.Debug = False,
    config: job_flags.Config = None,
) -> None:  # fmt: skip
    """Say how likely the model finds the texts of INPUT; nothing is generated.

    [bold]nanovllm score pairs.jsonl -o scores.jsonl[/bold]

    A row is {"context": ..., "continuation": ...}, of which the continuation is scored, or
    {"prompt": ...}, {"messages": [...]} or {"prompt_token_ids": [...]}, scored from the second
    token on. To its columns come logprob, num_scored_tokens, perplexity and is_greedy.
    """

    signals = Signals()

    def job() -> ExitCode:
        options = GenerateOptions(
            inputs=inputs,
            output=output,
            output_columns=parse_output_columns(output_columns),
            errors=errors,
            model=model,
            revision=revision,
            tokenizer=tokenizer,
            offline=offline,
            verify_weights=verify_weights,
            engine=flags.engine_config(
                dtype=dtype,
                max_model_len=max_model_len,
                device=device,
                tensor_parallel_size=tensor_parallel_size,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                block_size=block_size,
                gpu_memory_utilization=gpu_memory_utilization,
                enforce_eager=enforce_eager,
                attention_backend=attention_backend,
                kv_cache_memory=kv_cache_memory,
                enable_prefix_caching=not no_prefix_caching,
            ),
            prompt=PromptOptions(
                prompt_column=prompt_column,
                messages_column=messages_column,
                pair_columns=(context_column, continuation_column),
                id_column=id_column,
            ),
            sampling=SAMPLING,
            parse_special=parse_special,
            token_logprobs=token_logprobs,
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
        return start_job(
            options,
            signals,
            dry_run=dry_run,
            single_process=single_process,
            flag_files={"--config": config},
        )

    raise typer.Exit(run_job(job, debug=debug, log=Log(log_format), signals=signals))
