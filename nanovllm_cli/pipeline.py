"""The whole job, from files to a file.

The order is chosen so that a mistake is told before anything expensive happens: the inputs and
their first rows are looked at, then the model's files, then the output. Only then do the engines'
processes start. They import torch, which this process never does, while the inputs are read to
their end, and load the weights while the first rows are tokenized. A job whose rows are all done,
and one without rows, starts no engine.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from nanovllm_cli import __version__
from nanovllm_cli.core.checkpoint import check_checkpoint
from nanovllm_cli.core.config import ModelConfig
from nanovllm_cli.core.grammar import GrammarError, Grammars

from .engines import LoadEngine, load_engine
from .exit_code import CommandError, ExitCode
from .files import as_text
from .fingerprint import fingerprint
from .finished import JobRecord
from .first_rows import try_first_rows
from .inputs import find_inputs
from .log import Log
from .metrics_file import MetricsFile
from .models import default_sampling, resolve_model, tokenizer_path
from .options import GenerateOptions
from .output import JobOutput, open_output
from .output_paths import OutputPaths, beside
from .process_clock import process_start
from .progress import Progress
from .rows import check_inputs, read_rows
from .signals import Signals, Stopped
from .start_notes import start_notes
from .tokenizer_files import tokenizer_directory
from .totals import Totals


def generate(
    options: GenerateOptions,
    load: LoadEngine = load_engine,
    *,
    start: Callable[[], None] = lambda: None,
    signals: Signals | None = None,
) -> ExitCode:
    """Run the job to its end; `start` is called as soon as it is all but sure that `load` will be.

    Raises UserError for what ends it as a whole, and Stopped.
    """
    totals, signals = _new_totals(options), signals or Signals()
    progress = Progress(
        totals,
        Log(options.log_format),
        quiet=options.quiet,
        is_stdout=options.output == "-",
        metrics=_metrics_file(options),
        status_requests=signals.status_requests,
    )
    with progress:
        return _generate(options, load, start, totals, progress, signals)


def _generate(
    options: GenerateOptions,
    load: LoadEngine,
    start: Callable[[], None],
    totals: Totals,
    progress: Progress,
    signals: Signals,
) -> ExitCode:
    with totals.phase("check"):
        sources = find_inputs(options.inputs, outputs=options.files_written)
        rows = read_rows(sources, limit=options.limit)
        rows = try_first_rows(rows, options.prompt, options.columns)
        first = next(rows, None)
        rows = chain([] if first is None else [first], rows)
        model = resolve_model(
            options.model,
            options.revision,
            offline=options.offline,
            shows_progress=not options.quiet and options.log_format == "text",
        )
        tokenizer = tokenizer_path(options.tokenizer, model, offline=options.offline)
        config = ModelConfig.from_directory(model)
        check_checkpoint(model, config)
        sampling = sampling_of(options, model)
        settings = fingerprint(
            options,
            model=model,
            tokenizer=tokenizer,
            sampling=sampling,
            say=partial(progress.say, "note"),
        )
        if (grammar := sampling.get("grammar")) is not None:
            checked_grammars(grammar, config, tokenizer)
        output = open_output(options, sources, settings)
    try:
        if first is None:
            progress.say("empty", "the input has no rows", "warning")
        elif output.finished is None:
            start()
        with totals.phase("count"):
            num_rows = check_inputs(sources, limit=options.limit)
        with totals.phase("resume"):
            is_complete = output.resume(num_rows) or first is None
        if output.finished is not None:
            return _nothing_to_do(options, output.finished, totals, progress)
        if num_rows is not None:
            totals.num_expected_rows = options.shard.size(num_rows)
        if output.journal is not None:
            totals.resume(output.journal)
        try:
            if not is_complete:
                told, rows = start_notes(
                    rows,
                    options,
                    sampling=sampling,
                    max_model_len=int(settings["max_model_len"]),
                )
                for level, note in told:
                    progress.say("note", note, level)
                from .run_rows import run_rows  # late: most of what a job imports

                run_rows(options, model, sampling, rows, output, totals, progress, load, signals)
            exit_code = _exit_code(options, totals.num_failed_rows)
            with totals.phase("publish"), signals.held():
                output.publish(exit_code, partial(_stats, options, totals, exit_code))
        except Stopped as stopped:
            stopped.message += f"; {_what_is_kept(output, totals)}"
            raise
        progress.end(exit_code, files=_files(options, totals))
        return exit_code
    finally:
        output.close()


def sampling_of(options: GenerateOptions, model: Path) -> dict[str, Any]:
    """The sampling parameters of rows that say nothing: of flags, then --generation-config."""
    source = options.generation_config
    if source == "vllm":
        return options.sampling
    if source == "auto":
        return default_sampling(model) | options.sampling
    directory = Path(source)
    if not (directory / "generation_config.json").is_file():
        raise CommandError(
            f"--generation-config {source} is a directory without generation_config.json"
            if directory.is_dir()
            else f"--generation-config {source} is not a directory",
            "Give a directory that holds generation_config.json, auto or vllm.",
            exit_code=ExitCode.NOT_FOUND,
        )
    return default_sampling(directory) | options.sampling


def checked_grammars(grammar: str | None, model: ModelConfig, tokenizer: Path) -> Grammars:
    """Return the grammars of a model; `grammar`, of all rows, is compiled for the model's tokens.

    Raises CommandError where it names some that there are not. tokenizer: a directory.
    """
    directory = tokenizer_directory(tokenizer)
    grammars = Grammars(directory, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids)
    if grammar is not None:
        try:
            grammars.matcher(grammar)
        except GrammarError as error:
            raise CommandError(
                f"the rows' grammar cannot be used with this model: {error}"
            ) from None
    return grammars


def _metrics_file(options: GenerateOptions) -> MetricsFile | None:
    if options.metrics_file is None:
        return None
    path = Path(options.metrics_file)
    paths = OutputPaths.of(options.output, options.errors)
    if path.absolute() in [other.absolute() for other in (paths.output, paths.errors) if other]:
        raise CommandError(f"--metrics-file {path} is an output of the job", "Name another file.")
    return MetricsFile(path, {"output": options.output, "model": options.model})


def _nothing_to_do(
    options: GenerateOptions, record: JobRecord, totals: Totals, progress: Progress
) -> ExitCode:
    totals.take_finished(record)
    exit_code = _exit_code(options, totals.num_failed_rows)
    message = (
        f"nothing to do: {options.output} has all {record.num_completed} rows of this job, "
        f"{len(record.failed_rows)} failed"
    )
    files = _files(options, totals)
    if "errors" in files:
        message += f" ({files['errors']}); --retry-failed runs them again"
    progress.end(exit_code, message, files=files)
    return exit_code


def _new_totals(options: GenerateOptions) -> Totals:
    return Totals(is_score=options.prompt.is_score, started=process_start())


def _files(options: GenerateOptions, totals: Totals) -> dict[str, str]:
    """The files that a finished job leaves, by what they are."""
    paths = OutputPaths.of(options.output, options.errors)
    files: dict[str, Path | None] = {
        "output": paths.output,
        "errors": paths.errors if totals.num_failed_rows else None,
        "stats": None if paths.output is None else beside(paths.output, "stats.json"),
    }
    return {what: str(path) for what, path in files.items() if path is not None}


def _what_is_kept(output: JobOutput, totals: Totals) -> str:
    if output.journal is None:
        return "nothing is kept of a job that writes to standard output"
    return f"{totals.counts()}, and the same line goes on from there"


def _exit_code(options: GenerateOptions, num_failed_rows: int) -> ExitCode:
    are_wrong = num_failed_rows > 0 and not options.allow_errors
    return ExitCode.SOME_ROWS_FAILED if are_wrong else ExitCode.OK


def _stats(options: GenerateOptions, totals: Totals, exit_code: ExitCode) -> dict[str, Any]:
    return {
        "nanovllm_version": __version__,
        "command": "score" if options.prompt.is_score else "generate",
        "model": as_text(options.model),
        "seed": options.seed,
        "inputs": [as_text(name) for name in options.inputs],
        "output_columns": [as_text(name) for name in options.output_columns],
        "exit_code": int(exit_code),
        **totals.as_dict(),
    }
