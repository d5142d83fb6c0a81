"""A command's body and the exit code that its error becomes."""

import os
import signal
from typing import Any

import pytest

from nanovllm_cli.core.errors import (
    EngineDied,
    GpuFailed,
    MemoryTooSmall,
    ModelError,
    UserError,
)
from nanovllm_cli.exit_code import CommandError, ExitCode
from nanovllm_cli.run_job import run_job
from nanovllm_cli.signals import Signals


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("x"), 2),
        (ModelError("x"), 65),
        (CommandError("x", exit_code=ExitCode.LOCKED), 75),
        (MemoryTooSmall("x"), 69),
        (GpuFailed("x"), 69),
        (EngineDied("x"), 69),
        (ZeroDivisionError(), 1),
    ],
    ids=repr,
)
def test_an_error_has_its_exit_code_and_one_line(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def job() -> ExitCode:
        raise error

    assert run_job(job, debug=False) == code
    assert "Traceback" not in capsys.readouterr().err
    run_job(job, debug=True)
    has_trace = "Traceback" in capsys.readouterr().err
    assert has_trace == isinstance(error, Exception)


@pytest.mark.parametrize("when", ["enter", "exit"])
def test_a_signal_just_before_or_after_the_body_ends_it_like_any_other(
    when: str, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(Signals):
        def __enter__(self) -> Signals:
            super().__enter__()
            if when == "enter":
                os.kill(os.getpid(), signal.SIGALRM)
            return self

        def __exit__(self, *error: Any) -> None:
            if when == "exit" and self.received is None:
                os.kill(os.getpid(), signal.SIGALRM)
            super().__exit__(*error)

    signals = Interrupted()
    try:
        assert run_job(lambda: ExitCode.OK, debug=False, signals=signals) == ExitCode.TIMED_OUT
    finally:
        Signals.__exit__(signals, None, None, None)
    assert capsys.readouterr().err == "error: the time of --timeout is over\n"
