"""What is missing in an output -> run: the model is loaded, and rows go through it.

Apart from pipeline.py because a job that has nothing to do needs none of it.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .engines import LoadEngine
from .exit_code import CommandError, ExitCode
from .feeder import Feeder, to_prompts
from .job import Job
from .models import tokenizer_path
from .options import GenerateOptions
from .output import JobOutput
from .placement import parallel_notes
from .progress import Progress
from .prompt_limit import max_text_bytes
from .rows import BadRow, Row
from .signals import Signals
from .tokenizer import PromptTokenizer
from .tokenizer_files import tokenizer_directory
from .totals import Totals


def load_tokenizer(options: GenerateOptions, model_path: Path) -> PromptTokenizer:
    """The tokenizer that `options` name: the model's own where they name none."""
    path = tokenizer_path(options.tokenizer, model_path, offline=options.offline)
    return PromptTokenizer(
        path, parse_special=options.parse_special, chat_template=options.prompt.chat_template
    )


def run_rows(
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
            directory = tokenizer_path(options.tokenizer, model, offline=options.offline)
            path = os.fspath(tokenizer_directory(directory).absolute())
            # A process of its own loads meanwhile.
            engine = load(model, replace(options.engine, tokenizer_path=path))
            tokenizer = load_tokenizer(options, model)
            prompts = output.missing(to_prompts(output.watch(rows), options.prompt))
            most = max_text_bytes(options, model, directory)
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
