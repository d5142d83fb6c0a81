"""`--dry-run`: read and tokenize everything, say what the job would need, and generate nothing.

Rows are planned by the job's RowPlanner and checked by the engine's RequestChecks, weights by the
headers of their files: what it finds good the job finds good.
"""

import sys
from collections import Counter

from rich.console import Console
from rich.table import Table

from nanovllm_cli.core.checkpoint import check_tied_head, checked_tensors
from nanovllm_cli.core.config import ModelConfig
from nanovllm_cli.core.kv_sizes import longest_sequence
from nanovllm_cli.core.request import Failure
from nanovllm_cli.core.request_checks import RequestChecks
from nanovllm_cli.core.resolved_config import resolve

from .exit_code import ExitCode
from .feeder import to_prompts, tokenize
from .first_rows import try_first_rows
from .inputs import find_inputs
from .models import resolve_model, tokenizer_path
from .options import GenerateOptions
from .pipeline import checked_grammars, sampling_of
from .prompt_limit import max_text_bytes
from .refusal import Refused
from .row_plan import RowPlan, RowPlanner
from .rows import BadRow, check_inputs, read_rows
from .run_rows import load_tokenizer


def dry_run(options: GenerateOptions) -> ExitCode:
    """Report on stderr; the exit code is the one the job's bad rows would give."""
    sources = find_inputs(options.inputs, outputs=options.files_written)
    check_inputs(sources, limit=options.limit)
    rows = read_rows(sources, limit=options.limit)
    rows = try_first_rows(rows, options.prompt, options.columns)
    path = resolve_model(options.model, options.revision, offline=options.offline)
    model = ModelConfig.from_directory(path)
    engine = resolve(options.engine, model)
    sampling = sampling_of(options, path)
    weights = checked_tensors(path, model)
    if model.tie_word_embeddings:
        check_tied_head(weights)
    max_model_len = longest_sequence(model, engine)
    directory = tokenizer_path(options.tokenizer, path, offline=options.offline)
    checks = RequestChecks(
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        max_model_len=max_model_len,
        grammars=checked_grammars(sampling.get("grammar"), model, directory),
    )
    tokenizer = load_tokenizer(options, path)
    planner = RowPlanner(options, sampling, tokenizer)

    errors: Counter[str] = Counter()
    num_rows = num_prompt_tokens = num_completion_tokens = longest_prompt = longest = 0
    max_bytes = max_text_bytes(options, path, directory)
    for chunk in to_prompts(rows, options.prompt):
        for fed in tokenize(chunk, tokenizer, max_bytes):
            if isinstance(fed, BadRow):
                errors[fed.code] += 1
                continue
            try:
                plans = planner.plans(fed)
                for plan in plans:
                    _check(plan, checks)
            except Refused as refused:
                errors[refused.code] += 1
                continue
            num_rows += 1
            for plan in plans:
                length = len(plan.token_ids)
                num_prompt_tokens += length
                room = max_model_len - length
                most = min(plan.requests[0].sampling.max_tokens or room, room)
                num_completion_tokens += most * len(plan.requests)
                longest_prompt = max(longest_prompt, length)
                longest = max(longest, length + most)

    kv_bytes = model.kv_bytes_per_token(4 if engine.dtype == "float32" else 2)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    num_bytes = sum(tensor.end - tensor.start for tensor in weights.values())
    num_files = len({tensor.file for tensor in weights.values()})
    table.add_row(
        "weights",
        f"{len(weights)} tensors in {num_files} file{'s' if num_files > 1 else ''}, "
        f"{num_bytes / 2**20:.1f} MiB, as config.json asks for",
    )
    table.add_row("rows", f"{num_rows} good, {errors.total()} bad")
    for code, count in errors.most_common():
        table.add_row("", f"{count} {code}")
    table.add_row("prompt tokens", f"{num_prompt_tokens}, the longest prompt {longest_prompt}")
    if not options.prompt.is_score:
        table.add_row("completion tokens", f"at most {num_completion_tokens}")
    table.add_row(
        "KV cache",
        f"{kv_bytes * longest / 2**20:.1f} MiB for the longest row, at most "
        f"{kv_bytes * longest * engine.max_num_seqs / 2**20:.1f} MiB for "
        f"{engine.max_num_seqs} such at a time",
    )
    if not options.quiet:
        Console(file=sys.stderr).print(table, highlight=False)
    return ExitCode.SOME_ROWS_FAILED if errors and not options.allow_errors else ExitCode.OK


def _check(plan: RowPlan, checks: RequestChecks) -> None:
    """Raise Refused for what the engine would refuse."""
    for request in plan.requests:
        checked = checks.sequence_of(request)
        if isinstance(checked, Failure):
            raise Refused(checked.code, checked.message)
