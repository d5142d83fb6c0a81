"""The whole job, from files to a file.

The order is chosen so that a mistake is told before anything expensive happens: the inputs and
their first rows are looked at, then the model's files, then the output. Only then do the engines'
processes start. They import torch, which this process never does, while the inputs are read to
their end, and load the weights while the first rows are tokenized. A job whose rows are all done,
and one without rows, starts no engine.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

from nanovllm_cli import __version__
from nanovllm_cli.core.checkpoint import check_checkpoint
from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.device_shares import start_children
from nanovllm_cli.core.engine_child import EngineChild
from nanovllm_cli.core.engine_client import EngineClient
from nanovllm_cli.core.engine_process import EngineProcess
from nanovllm_cli.core.engine_replicas import EngineReplicas
from nanovllm_cli.core.grammar import GrammarError, Grammars

from .exit_code import CommandError, ExitCode
from .feeder import Feeder, to_prompts
from .files import as_text
from .fingerprint import fingerprint
from .finished import JobRecord
from .first_rows import try_first_rows
from .inputs import find_inputs
from .job import Job
from .log import Log
from .metrics_file import MetricsFile
from .models import default_sampling, resolve_model, resolve_tokenizer
from .options import GenerateOptions
from .output import JobOutput, open_output
from .output_paths import OutputPaths, beside
from .placement import parallel_notes
from .process_clock import process_start
from .progress import Progress
from .prompt_limit import max_text_bytes
from .rows import BadRow, Row, check_inputs, read_rows
from .signals import Signals, Stopped
from .start_notes import start_notes
from .tokenizer import PromptTokenizer
from .tokenizer_files import tokenizer_directory
from .totals import Totals

LoadEngine = Callable[[Path, EngineConfig], EngineClient]


def load_engine(path: Path, config: EngineConfig) -> EngineClient:
    """Load the engine with the checkpoint in the directory `path` into this process."""
    from nanovllm_cli.core.engine import Engine  # late: it imports torch

    return Engine.from_checkpoint(path, config)


class EngineProcesses:
    """A job's engines, each in a process of its own: a death costs a restart and not the job.

    Whatever ends the block ends the processes.
    """

    def __init__(self, num_engines: int, num_ranks_each: int) -> None:
        self._num_engines = num_engines
        self._num_ranks_each = num_ranks_each
        self._children: list[EngineChild] = []

    def __enter__(self) -> "EngineProcesses":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for child in self._children:
            child.kill()  # nothing is left to kill where the job has closed it

    def start(self) -> None:
        """Start the processes, which import torch and wait for `load`."""
        self._children = start_children(self._num_engines, self._num_ranks_each)

    def load(self, path: Path, config: EngineConfig) -> EngineClient:
        """Have them load the checkpoint in the directory `path`; start them if nobody has yet."""
        if not self._children:
            self.start()
        if len(self._children) == 1:
            return EngineProcess(path, config, child=self._children[0])
        return EngineReplicas(
            path, config, num_replicas=len(self._children), children=self._children
        )


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
        check_checkpoint(model, ModelConfig.from_directory(model))
        sampling = sampling_of(options, model)
        settings = fingerprint(
            options,
            model=model,
            tokenizer=_tokenizer_path(options, model),
            sampling=sampling,
            say=partial(progress.say, "note"),
        )
        _check_grammar(sampling.get("grammar"), model, _tokenizer_path(options, model))
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
                _run(options, model, sampling, rows, output, totals, progress, load, signals)
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


def load_tokenizer(options: GenerateOptions, model_path: Path) -> PromptTokenizer:
    """The tokenizer that `options` name: the model's own where they name none."""
    path = _tokenizer_path(options, model_path)
    return PromptTokenizer(
        path, parse_special=options.parse_special, chat_template=options.prompt.chat_template
    )


def _run(
    options: GenerateOptions,
    model: Path,
    sampling: dict[str, Any],
    rows: Iterator[Row | BadRow],
    output: JobOutput,
    totals: Totals,
    progress: Progress,
    load: LoadEngine,
    signals: Signals,
) -> None:
    """Load the model and run what is missing in the output."""
    feeder = engine = None
    progress.begin(f"{totals.counts()}; loading {options.model}")
    for note in parallel_notes(options.engine, options.data_parallel_size, model):
        progress.say("note", note)
    try:
        with totals.phase("load"):
            path = os.fspath(tokenizer_directory(_tokenizer_path(options, model)).absolute())
            # A process of its own loads meanwhile.
            engine = load(model, replace(options.engine, tokenizer_path=path))
            tokenizer = load_tokenizer(options, model)
            prompts = output.missing(to_prompts(output.watch(rows), options.prompt))
            most = max_text_bytes(options, model, _tokenizer_path(options, model))
            feeder = Feeder(prompts, tokenizer, options.rows_in_flight, max_text_bytes=most)
            totals.attention_backend = engine.attention_backend
        totals.engine = engine.stats
        job = Job(
            options,
            sampling=sampling,
            engine=engine,
            tokenizer=tokenizer,
            feeder=feeder,
            output=output,
            totals=totals,
            signals=signals,
        )
        with totals.phase("generate"), signals.held():
            is_done = job.run(progress)
    finally:
        if engine is not None:
            engine.close()
        if feeder is not None:
            feeder.close()
    if not is_done:
        signals.raise_received()
        raise CommandError(
            f"{totals.num_failed_rows} rows failed, a larger share than --max-error-rate "
            f"{options.max_error_rate} of those taken: "
            + ", ".join(f"{count} {code}" for code, count in totals.errors.most_common(3)),
            "Rows that are done are kept. Mend the rows and add --retry-failed, or raise the rate.",
            exit_code=ExitCode.SOME_ROWS_FAILED,
        )


def _tokenizer_path(options: GenerateOptions, model: Path) -> Path:
    if options.tokenizer is None:
        return model
    return resolve_tokenizer(options.tokenizer, offline=options.offline)


def _check_grammar(grammar: str | None, model: Path, tokenizer: Path) -> None:
    """Compile the flags' grammar for the model's tokens: it may name some that there are not."""
    if grammar is None:
        return
    sizes = ModelConfig.from_directory(model)
    directory = tokenizer_directory(tokenizer)
    grammars = Grammars(directory, vocab_size=sizes.vocab_size, eos_token_ids=sizes.eos_token_ids)
    try:
        grammars.matcher(grammar)
    except GrammarError as error:
        raise CommandError(f"the rows' grammar cannot be used with this model: {error}") from None


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
