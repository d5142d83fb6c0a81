"""The command line: options -> one job -> an exit code. Errors go to stderr, without a traceback.

Commands import what they run inside their bodies: torch and transformers take seconds to import,
and `--help` must answer at once.
"""

import difflib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import typer

from nanovllm_cli import __version__
from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.core.errors import MemoryTooSmall, ModelError, UserError

from .exit_code import CommandError, ExitCode
from .options import GenerateOptions
from .prompts import PromptOptions
from .settings import load_config_file, option

app = typer.Typer(
    name="nanovllm",
    help="Complete files of prompts with Qwen3, on this machine: rows in, rows out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_OUTPUT, _PROMPTS, _SAMPLING = "Output", "Prompts", "Sampling (a row's own fields come first)"
_MODEL, _ENGINE, _RUN = "Model", "Engine", "Run"
_ENGINE_DEFAULTS = EngineConfig()


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Show the version and exit."),
) -> None:
    if version:
        typer.echo(f"nanovllm {__version__}")
        raise typer.Exit


@app.command("generate")
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
        help="Failed rows; default OUTPUT.errors.jsonl, or stderr.",
    ),
    overwrite: bool = option(
        False, "--overwrite", panel=_OUTPUT, help="Replace OUTPUT when the job is done."
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
    n: int = option(1, "--n", panel=_SAMPLING, help="Completions for each row."),
    seed: int = option(0, "--seed", panel=_SAMPLING, help="Two runs with one seed are the same."),
    model: str = option(
        GenerateOptions.model, "--model", "-m", panel=_MODEL, metavar="NAME",
        help="A directory, Qwen3-0.6B ... Qwen3-32B, or org/name[@revision].",
    ),
    revision: str | None = option(None, "--revision", panel=_MODEL, help="Branch, tag or commit."),
    tokenizer: str | None = option(
        None, "--tokenizer", panel=_MODEL, metavar="NAME", help="Default: the model's own."
    ),
    dtype: str = option(
        _ENGINE_DEFAULTS.dtype, "--dtype", panel=_MODEL,
        metavar="auto|float32|bfloat16|float16",
        help="auto: bfloat16 on a GPU, float32 on a CPU.",
    ),
    offline: bool = option(
        False, "--offline", panel=_MODEL, help="Never ask the hub; as HF_HUB_OFFLINE=1."
    ),
    max_model_len: int | None = option(
        None, "--max-model-len", panel=_ENGINE, help="Prompt and completion at most."
    ),
    device: str = option(
        _ENGINE_DEFAULTS.device, "--device", panel=_ENGINE, metavar="auto|cpu|cuda",
        help="auto: a GPU where there is one.",
    ),
    max_num_seqs: int | None = option(
        None, "--max-num-seqs", panel=_ENGINE,
        help="Sequences that run at a time; default: 1024 on a GPU, 256 on a CPU.",
    ),
    max_num_batched_tokens: int | None = option(
        None, "--max-num-batched-tokens", panel=_ENGINE,
        help="Prompt tokens in one prefill; default: 16384 on a GPU, 8192 on a CPU.",
    ),
    gpu_memory_utilization: float = option(
        _ENGINE_DEFAULTS.gpu_memory_utilization, "--gpu-memory-utilization", panel=_ENGINE,
        help="Share of the GPU's memory to use.",
    ),
    enforce_eager: bool = option(
        False, "--enforce-eager", panel=_ENGINE,
        help="No CUDA graphs: a quicker start, slower steps.",
    ),
    block_size: int = option(
        _ENGINE_DEFAULTS.block_size, "--block-size", panel=_ENGINE,
        help="Tokens of a KV block, the grain of prefix caching.",
    ),
    kv_cache_memory: float | None = option(
        None, "--kv-cache-memory", panel=_ENGINE, metavar="GIB", help="Default: what the job needs."
    ),
    no_prefix_caching: bool = option(
        False, "--no-prefix-caching", panel=_ENGINE, help="Compute every prompt in full."
    ),
    max_inflight: int | None = option(
        None, "--max-inflight", panel=_ENGINE, metavar="ROWS",
        help="Rows read ahead of the output; default: 4 x max-num-seqs, or 4096.",
    ),
    limit: int | None = option(
        None, "--limit", panel=_RUN, metavar="ROWS", min=1, help="Only the first rows."
    ),
    dry_run: bool = option(
        False, "--dry-run", panel=_RUN,
        help="Read and tokenize everything, report, and generate nothing.",
    ),
    allow_errors: bool = option(
        False, "--allow-errors", panel=_RUN, help="Exit 0 though some rows failed."
    ),
    quiet: bool = option(False, "--quiet", "-q", panel=_RUN, help="Silent unless something fails."),
    debug: bool = option(False, "--debug", panel=_RUN, help="Tracebacks for errors."),
    config: Path | None = typer.Option(
        None, "--config", rich_help_panel=_RUN, metavar="FILE", envvar="NANOVLLM_CONFIG",
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
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                block_size=block_size,
                gpu_memory_utilization=gpu_memory_utilization,
                enforce_eager=enforce_eager,
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
            allow_errors=allow_errors,
            limit=limit,
            max_inflight=max_inflight,
            quiet=quiet,
        )
        if dry_run:
            from .dry_run import dry_run as run
        else:
            from .pipeline import generate as run
        return run(options)

    raise typer.Exit(_run_job(job, debug=debug))


@app.command("bench")
def bench_command(
    model: str = option(
        GenerateOptions.model, "--model", "-m", panel=_MODEL, metavar="NAME",
        help="Random weights where there is no checkpoint of Qwen3-0.6B ... Qwen3-32B.",
    ),
    workload: str = option(
        "nano", "--workload", panel=_RUN,
        metavar="NAME",
        help="nano, decode-heavy, prefill-heavy, shared-prefix or short-answers.",
    ),
    repeats: int = option(3, "--repeats", panel=_RUN, help="Timed passes after a warm-up."),
    temperature: float = option(0.6, "--temperature", panel=_RUN, help="0 is greedy."),
    limit: int | None = option(
        None, "--limit", panel=_RUN, metavar="ROWS", min=1, help="Only the first sequences."
    ),
    device: str = option(
        _ENGINE_DEFAULTS.device, "--device", panel=_ENGINE, metavar="auto|cpu|cuda",
        help="auto: a GPU where there is one.",
    ),
    max_num_seqs: int | None = option(
        None, "--max-num-seqs", panel=_ENGINE, help="Sequences that run at a time."
    ),
    max_num_batched_tokens: int | None = option(
        None, "--max-num-batched-tokens", panel=_ENGINE, help="Prompt tokens in one prefill."
    ),
    enforce_eager: bool = option(False, "--enforce-eager", panel=_ENGINE, help="No CUDA graphs."),
    debug: bool = option(False, "--debug", panel=_RUN, help="Tracebacks for errors."),
) -> None:  # fmt: skip
    """Time a fixed workload: a table on stderr, one JSON document on stdout.

    [bold]nanovllm bench --model Qwen3-0.6B[/bold]
    """

    def job() -> ExitCode:
        from .bench import BenchOptions, bench

        engine = EngineConfig(
            device=device,  # type: ignore[arg-type]  # checked by EngineConfig
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enforce_eager=enforce_eager,
        )
        return bench(
            BenchOptions(
                model=model,
                workload=workload,
                repeats=repeats,
                temperature=temperature,
                limit=limit,
                engine=engine,
            )
        )

    raise typer.Exit(_run_job(job, debug=debug))


@app.command("doctor")
def doctor_command(
    json: bool = typer.Option(False, "--json", help="One JSON document on stdout."),
) -> None:
    """Say what this machine can run, and with which kernels."""

    def job() -> ExitCode:
        from .doctor import doctor

        return doctor(as_json=json)

    raise typer.Exit(_run_job(job, debug=False))


def main() -> NoReturn:
    """The `nanovllm` command."""
    if sys.stderr is None:  # closed (2>&-); what is meant for it must not go to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        exit_code = app(standalone_mode=False)
    except UserError as error:  # of --config, before a command runs
        exit_code = _report(error.message, error.hint, _exit_code_of(error))
    except OSError as error:  # of --help: what a job raises ends in _run_job
        exit_code = _report(f"cannot write standard output: {error}", None, ExitCode.IO_ERROR)
    except Exception as error:
        # Typer's usage errors have a base class that differs between its versions.
        if not hasattr(error, "format_message"):
            raise
        hint = "nanovllm --help lists the commands, nanovllm generate --help the flags."
        message = error.format_message()
        if possibilities := getattr(error, "possibilities", None):
            name = str(getattr(error, "option_name", ""))
            message = f"no such option: {name}"
            near = difflib.get_close_matches(name, possibilities, n=1)
            hint = f"Did you mean {near[0]}?" if near else hint
        exit_code = ExitCode.USAGE
        if message:  # empty where the help was shown instead
            exit_code = _report(message, hint, ExitCode.USAGE)
    # What a full disk did not take, Python would try again at its end, and make it exit code 120.
    for name in ("stdout", "stderr"):
        try:
            if getattr(sys, name) is not None:
                getattr(sys, name).flush()
        except OSError:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
            if name == "stdout":
                exit_code = exit_code or ExitCode.IO_ERROR
    sys.exit(exit_code)


def _run_job(job: Callable[[], ExitCode], *, debug: bool) -> ExitCode:
    """Run a command's body; its exceptions become messages on stderr and exit codes."""
    try:
        return job()
    except BrokenPipeError:
        # Whoever read stdout has left (`| head -1`): end as the signal would have ended us.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)
        return ExitCode.PIPE_CLOSED
    except KeyboardInterrupt:
        return _report("interrupted; nothing was published", None, ExitCode.INTERRUPTED)
    except UserError as error:
        if debug:
            traceback.print_exc()
        return _report(error.message, error.hint, _exit_code_of(error))
    except Exception as error:
        if debug:
            traceback.print_exc()
        message = f"internal error: {type(error).__name__}: {error}"
        return _report(message, "Add --debug for the traceback.", ExitCode.INTERNAL)


def _exit_code_of(error: UserError) -> ExitCode:
    if isinstance(error, CommandError):
        return error.exit_code
    if isinstance(error, ModelError):
        return ExitCode.INPUT_UNUSABLE
    return ExitCode.UNAVAILABLE if isinstance(error, MemoryTooSmall) else ExitCode.USAGE


def _report(message: str, hint: str | None, exit_code: ExitCode) -> ExitCode:
    with suppress(OSError):  # whether or not it can be read, the exit code says it too
        print(f"error: {message}", file=sys.stderr)
        if hint is not None:
            print(f"\nhint: {hint}", file=sys.stderr)
    return exit_code
