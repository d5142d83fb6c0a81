"""The whole job, from files to a file.

The order is chosen so that a mistake is found before anything expensive: the inputs and the output
are checked first, then the model's files, and only then are the weights loaded, while the first
rows are already being tokenized.
"""

from pathlib import Path

import orjson

from nanovllm_cli import __version__
from nanovllm_cli.core.engine import Engine

from .exit_code import ExitCode
from .feeder import Feeder, to_prompts
from .first_rows import try_first_rows
from .inputs import find_inputs
from .job import Job
from .models import default_sampling, resolve_model
from .options import GenerateOptions
from .output import JobOutput
from .progress import Progress
from .rows import check_inputs, read_rows
from .tokenizer import PromptTokenizer
from .totals import Totals


def generate(options: GenerateOptions) -> ExitCode:
    """Run the job to its end; raises UserError for what ends it as a whole."""
    totals = Totals()
    with totals.phase("check"):
        sources = find_inputs(options.inputs)
        num_rows = check_inputs(sources, limit=options.limit)
        rows = try_first_rows(read_rows(sources, limit=options.limit), options.prompt)
        path = resolve_model(options.model, options.revision, offline=options.offline)
        sampling = default_sampling(path) | options.sampling
    totals.num_expected_rows = num_rows
    output = JobOutput(options, sources)
    feeder = None
    try:
        with totals.phase("load"):
            tokenizer = load_tokenizer(options, path)
            prompts = to_prompts(rows, options.prompt)
            feeder = Feeder(prompts, tokenizer, options.rows_in_flight)
            engine = Engine.from_checkpoint(path, options.engine)
        totals.engine = engine.stats
        with totals.phase("generate"), Progress(totals, quiet=options.quiet) as progress:
            Job(
                options,
                sampling=sampling,
                engine=engine,
                tokenizer=tokenizer,
                feeder=feeder,
                output=output,
                totals=totals,
            ).run(progress)
        with totals.phase("publish"):
            output.publish()
        exit_code = ExitCode.OK
        if totals.num_failed_rows and not options.allow_errors:
            exit_code = ExitCode.SOME_ROWS_FAILED
        output.publish_stats(_stats_json(options, totals, exit_code))
        progress.close()
        return exit_code
    finally:
        if feeder is not None:
            feeder.close()
        output.close()


def load_tokenizer(options: GenerateOptions, model_path: Path) -> PromptTokenizer:
    """The tokenizer that `options` name: the model's own where they name none."""
    path = model_path
    if options.tokenizer is not None:
        path = resolve_model(options.tokenizer, offline=options.offline)
    return PromptTokenizer(path, parse_special=options.parse_special)


def _stats_json(options: GenerateOptions, totals: Totals, exit_code: ExitCode) -> bytes:
    stats = {
        "nanovllm_version": __version__,
        "model": options.model,
        "seed": options.seed,
        "exit_code": int(exit_code),
        **totals.as_dict(),
    }
    return orjson.dumps(stats, option=orjson.OPT_INDENT_2) + b"\n"
