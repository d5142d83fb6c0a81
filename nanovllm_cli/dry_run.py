"""`--dry-run`: read and tokenize everything, say what the job would need, and generate nothing."""

import sys
from collections import Counter

from rich.console import Console
from rich.table import Table

from nanovllm_cli.core.config import ModelConfig
from nanovllm_cli.core.machine_rates import cpu_matmul_rate
from nanovllm_cli.core.resolved_config import resolve

from .exit_code import ExitCode
from .feeder import to_prompts, tokenize
from .first_rows import try_first_rows
from .inputs import find_inputs
from .models import resolve_model
from .options import GenerateOptions
from .pipeline import load_tokenizer, sampling_of
from .refusal import Refused
from .row_plan import RowPlan, RowPlanner
from .rows import BadRow, check_inputs, read_rows


def dry_run(options: GenerateOptions) -> ExitCode:
    """Report on stderr; the exit code is the one the job's bad rows would give."""
    sources = find_inputs(options.inputs)
    check_inputs(sources, limit=options.limit)
    rows = read_rows(sources, limit=options.limit)
    rows = try_first_rows(rows, options.prompt, options.columns)
    path = resolve_model(options.model, options.revision, offline=options.offline)
    model = ModelConfig.from_directory(path)
    engine = resolve(options.engine, model)
    tokenizer = load_tokenizer(options, path)
    planner = RowPlanner(options, sampling_of(options, path), tokenizer)

    errors: Counter[str] = Counter()
    num_rows = num_prompt_tokens = num_completion_tokens = longest_prompt = longest = 0
    for chunk in to_prompts(rows, options.prompt):
        for fed in tokenize(chunk, tokenizer):
            if isinstance(fed, BadRow):
                errors[fed.code] += 1
                continue
            try:
                plans = planner.plans(fed)
                for plan in plans:
                    _check(plan, engine.max_model_len, model.vocab_size)
            except Refused as refused:
                errors[refused.code] += 1
                continue
            num_rows += 1
            for plan in plans:
                length = len(plan.token_ids)
                num_prompt_tokens += length
                room = engine.max_model_len - length
                most = min(plan.requests[0].sampling.max_tokens or room, room)
                num_completion_tokens += most * len(plan.requests)
                longest_prompt = max(longest_prompt, length)
                longest = max(longest, length + most)

    kv_bytes = model.kv_bytes_per_token(4 if engine.dtype == "float32" else 2)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
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
    if engine.device == "cpu":
        num_tokens = num_prompt_tokens + num_completion_tokens
        seconds = 2 * model.num_parameters * num_tokens / cpu_matmul_rate()
        table.add_row("time", f"at most about {seconds:.0f} s: every row to its limit, none cached")
    if not options.quiet:
        Console(file=sys.stderr).print(table, highlight=False)
    return ExitCode.SOME_ROWS_FAILED if errors and not options.allow_errors else ExitCode.OK


def _check(plan: RowPlan, max_model_len: int, vocab_size: int) -> None:
    """Raise Refused for what the engine would refuse."""
    if len(plan.token_ids) >= max_model_len:
        raise Refused("prompt_too_long", f"{len(plan.token_ids)} tokens")
    if max(plan.token_ids, default=vocab_size) >= vocab_size:
        raise Refused("bad_token_ids", "a token id that the vocabulary has not")
    sampling = plan.requests[0].sampling
    named = [*sampling.stop_token_ids, *(token_id for token_id, _ in sampling.logit_bias)]
    if max(named, default=0) >= vocab_size:
        raise Refused("bad_parameters", "a token id that the vocabulary has not")
