"""`nanovllm generate`: its flags -> GenerateOptions -> the job."""

from pathlib import Path
from typing import Any

import typer

from nanovllm_cli.core.errors import UserError

from . import flags, job_flags, sampling_flags
from .exit_code import ExitCode
from .flag_files import read_chat_template, read_prefix, read_template
from .log import Log
from .options import GenerateOptions
from .output_columns import parse_output_columns
from .prompt_options import PromptOptions
from .run_job import run_job
from .settings import option
from .shard import Shard
from .signals import Signals
from .start_job import start_job
from .structured_output import grammar_of_flags

_SAMPLING = sampling_flags.SAMPLING


def generate_command(
    inputs: job_flags.Inputs,
    output: job_flags.Output = "-",
    format: str = option(
        "auto", "--format", panel=job_flags.OUTPUT, metavar="auto|openai",
        help="openai: every row as an OpenAI batch line; auto: those that came as one.",
    ),
    output_columns: job_flags.OutputColumns = None,
    errors: job_flags.Errors = None,
    overwrite: job_flags.Overwrite = False,
    restart: job_flags.Restart = False,
    retry_failed: job_flags.RetryFailed = False,
    private: job_flags.Private = False,
    unordered: job_flags.Unordered = False,
    template: str | None = option(
        None, "--template", "-p", panel=job_flags.PROMPTS, metavar="TEXT",
        help="Build the prompt from columns: 'Translate: {text}'.",
    ),
    template_file: Path | None = option(
        None, "--template-file", panel=job_flags.PROMPTS, metavar="FILE",
        help="The template from a file, without its last newline.",
    ),
    prefix_file: Path | None = option(
        None, "--prefix-file", panel=job_flags.PROMPTS, metavar="FILE",
        help="Examples before every prompt: a text, or, for chats, a .json file of messages.",
    ),
    system: str | None = option(
        None, "--system", panel=job_flags.PROMPTS, metavar="TEXT",
        help="A system message before each chat that has none; prompts become chats.",
    ),
    chat_template: Path | None = option(
        None, "--chat-template", panel=job_flags.PROMPTS, metavar="FILE",
        help="A Jinja template for chats, instead of the model's own.",
    ),
    chat: bool = option(
        False, "--chat", panel=job_flags.PROMPTS,
        help="Make a prompt a user message, not a raw completion.",
    ),
    thinking: bool | None = option(
        None, "--thinking/--no-thinking", panel=job_flags.PROMPTS,
        help="Whether the model thinks before it answers; default: the template's.",
    ),
    thinking_budget: int | None = option(
        None, "--thinking-budget", panel=job_flags.PROMPTS, metavar="TOKENS",
        help="Most tokens of a thought; then the answer begins.",
    ),
    truncate_prompt_tokens: int | None = option(
        None, "--truncate-prompt-tokens", panel=job_flags.PROMPTS, metavar="TOKENS",
        help="Keep only this many tokens of a longer prompt, the last ones.",
    ),
    prompt_column: job_flags.PromptColumn = "prompt",
    messages_column: job_flags.MessagesColumn = "messages",
    id_column: job_flags.IdColumn = None,
    parse_special: job_flags.ParseSpecial = False,
    temperature: float | None = option(
        None, "--temperature", panel=_SAMPLING, help="0 is greedy. Default: the model's."
    ),
    top_p: float | None = option(
        None, "--top-p", panel=_SAMPLING,
        help="Draw from the likeliest tokens that make up this probability.",
    ),
    top_k: int | None = option(
        None, "--top-k", panel=_SAMPLING,
        help="Draw from this many of the likeliest tokens; 0 means all.",
    ),
    min_p: float | None = option(
        None, "--min-p", panel=_SAMPLING,
        help="Drop tokens with less than this share of the likeliest one's probability.",
    ),
    max_tokens: int | None = option(
        None, "--max-tokens", panel=_SAMPLING,
        help="Most tokens to generate; default: up to the model's limit.",
    ),
    min_tokens: int | None = option(
        None, "--min-tokens", panel=_SAMPLING,
        help="Generate at least this many tokens before a stop token.",
    ),
    stop: list[str] = option(
        [], "--stop", panel=_SAMPLING, metavar="TEXT", help="End before this text; repeatable."
    ),
    repetition_penalty: sampling_flags.RepetitionPenalty = None,
    presence_penalty: sampling_flags.PresencePenalty = None,
    frequency_penalty: sampling_flags.FrequencyPenalty = None,
    logit_bias: sampling_flags.LogitBias = None,
    bad_words: list[str] = option(
        [], "--bad-word", panel=_SAMPLING, metavar="TEXT", help="Never write this; repeatable."
    ),
    ignore_eos: bool = option(
        False, "--ignore-eos", panel=_SAMPLING, help="Generate on after the end of the text."
    ),
    json_schema: sampling_flags.JsonSchema = None,
    regex: sampling_flags.Regex = None,
    choice: sampling_flags.Choice = None,
    grammar: sampling_flags.Grammar = None,
    n: int = option(1, "--n", panel=_SAMPLING, help="Completions for each row."),
    best_of: sampling_flags.BestOf = None,
    logprobs: sampling_flags.Logprobs = None,
    prompt_logprobs: sampling_flags.PromptLogprobs = None,
    seed: int = option(0, "--seed", panel=_SAMPLING, help="Two runs with one seed are the same."),
    generation_config: str = option(
        "auto", "--generation-config", panel=_SAMPLING, metavar="auto|vllm|DIR",
        help="Whose sampling defaults: the model's, none, or those of DIR/generation_config.json.",
    ),
    model: flags.Model = GenerateOptions.model,
    served_model_name: str | None = option(
        None, "--served-model-name", panel=flags.MODEL, metavar="NAME",
        help="The model's name in OpenAI lines, where the row names none; default: --model.",
    ),
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
    """Complete every row of INPUT.

    [bold]nanovllm generate prompts.jsonl -o out.jsonl[/bold]

    A row is {"prompt": ...}, {"messages": [...]}, {"prompt_token_ids": [...]} or an OpenAI batch
    line. Its other columns travel through to the output. Each flag is also an environment
    variable: --max-tokens is NANOVLLM_MAX_TOKENS.
    """

    signals = Signals()

    def job() -> ExitCode:
        if template is not None and template_file is not None:
            raise UserError("--template and --template-file are both given", "Leave out one.")
        chosen = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "max_tokens": max_tokens,
            "min_tokens": min_tokens,
            "ignore_eos": ignore_eos or None,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "logit_bias": None
            if logit_bias is None
            else sampling_flags.parse_logit_bias(logit_bias),
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
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
            output_columns=parse_output_columns(output_columns),
            errors=errors,
            model=model,
            served_model_name=served_model_name,
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
                chat=chat,
                template=template if template_file is None else read_template(template_file),
                system=system,
                chat_template=None if chat_template is None else read_chat_template(chat_template),
                prefix=None if prefix_file is None else read_prefix(prefix_file),
                enable_thinking=thinking,
                prompt_column=prompt_column,
                messages_column=messages_column,
                id_column=id_column,
            ),
            sampling=sampling,
            generation_config=generation_config,
            n=n,
            best_of=best_of,
            stop=tuple(stop),
            bad_words=tuple(bad_words),
            truncate_prompt_tokens=truncate_prompt_tokens,
            thinking_budget=thinking_budget,
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
        return start_job(
            options,
            signals,
            dry_run=dry_run,
            single_process=single_process,
            flag_files={
                "--config": config,
                "--template-file": template_file,
                "--prefix-file": prefix_file,
                "--chat-template": chat_template,
                "--json-schema": json_schema,
                "--grammar": grammar,
            },
        )

    raise typer.Exit(run_job(job, debug=debug, log=Log(log_format), signals=signals))
