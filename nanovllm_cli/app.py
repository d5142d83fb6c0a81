"""The command line: one command a job, and how the process ends.

Commands import what they run inside their bodies: torch and transformers take seconds to import,
and `--help` must answer at once.
"""

import os
import signal
import sys
from typing import NoReturn

import typer

from nanovllm_cli import __version__
from nanovllm_cli.core.errors import UserError

from . import flags
from .bench_command import bench_command
from .exit_code import ExitCode
from .flag_command import FlagCommand, nearest
from .generate_command import generate_command
from .merge_command import merge_command
from .run_job import end_for_closed_pipe, report, report_error, run_job
from .score_command import score_command
from .settings import option

app = typer.Typer(
    name="nanovllm",
    help="Complete files of prompts with Qwen3, on this machine: rows in, rows out.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # Or Typer imports pydantic to convert them: 0.1 s.
        "default_map": dict.fromkeys(("help", "install_completion", "show_completion"), False),
    },
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Show the version and exit."),
) -> None:
    if version:
        typer.echo(f"nanovllm {__version__}")
        raise typer.Exit


app.command("generate", cls=FlagCommand)(generate_command)
app.command("score", cls=FlagCommand)(score_command)
app.command("merge")(merge_command)
app.command("bench", cls=FlagCommand)(bench_command)


@app.command("doctor")
def doctor_command(
    json: bool = option(False, "--json", panel=flags.RUN, help="One JSON document on stdout."),
    model: str | None = option(
        None, "--model", "-m", panel=flags.RUN, metavar="NAME",
        help="Say also whether to run this one with --tp or --dp here, and why.",
    ),
    debug: flags.Debug = False,
) -> None:  # fmt: skip
    """Say what this machine can run, and with which kernels."""

    def job() -> ExitCode:
        from .doctor import doctor

        return doctor(as_json=json, model=model)

    raise typer.Exit(run_job(job, debug=debug))


def _fill_standard_descriptors() -> None:
    """Let no file of a job become standard input, output or error, where one of these is closed.

    What a library prints would go into it. For Python they stay closed: sys.stdin is None.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        os.set_inheritable(descriptor, True)
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)


def main() -> NoReturn:
    """The `nanovllm` command."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before a job and after it
    _fill_standard_descriptors()
    if sys.stderr is None:  # closed (2>&-); what is meant for it must not go to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        exit_code = app(standalone_mode=False)
    except UserError as error:  # of --config, before a command runs
        exit_code = report_error(error)
    except SystemExit as error:  # of 1, click's and rich's answer to a closed pipe
        # A command raises typer.Exit; 0 is the end of what completes a line in a shell.
        exit_code = ExitCode.OK if not error.code else end_for_closed_pipe()
    except OSError as error:  # of --help: what a job raises ends in run_job
        exit_code = report(f"cannot write standard output: {error}", None, ExitCode.IO_ERROR)
    except Exception as error:
        # Typer's usage errors have a base class that differs between its versions.
        if not hasattr(error, "format_message"):
            sys.exit(report_error(error))
        hint = "nanovllm --help lists the commands, nanovllm COMMAND --help its flags."
        message = error.format_message()
        if hasattr(error, "possibilities") and hasattr(error, "option_name"):
            name = str(error.option_name)
            message = f"no such option: {name}"
            near = nearest(name, error.possibilities or ())
            hint = f"Did you mean {near}?" if near else hint
        exit_code = ExitCode.USAGE
        if message:  # empty where the help was shown instead
            exit_code = report(message, hint, ExitCode.USAGE)
    # What a full disk did not take, Python would try again at its end, and make it exit code 120.
    for name in ("stdout", "stderr"):
        try:
            if getattr(sys, name) is not None:
                getattr(sys, name).flush()
        except OSError as error:
            if name == "stdout" and isinstance(error, BrokenPipeError):
                end_for_closed_pipe()
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
            if name == "stdout":
                exit_code = exit_code or ExitCode.IO_ERROR
    sys.exit(exit_code)
