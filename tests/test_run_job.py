"""A command's body and the exit code that its error becomes."""

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
