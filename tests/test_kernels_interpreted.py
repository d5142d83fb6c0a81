"""The Triton kernels in Triton's interpreter, in a process of their own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

TESTS = sorted(Path(__file__).parent.glob("test_triton_*.py"))


Runs = dict[Path, Future[subprocess.CompletedProcess[str]]]


def interpret(tests: Path) -> subprocess.CompletedProcess[str]:
    """Run a file of tests."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        # The interpreter multiplies with numpy. In OpenBLAS's products for AVX2 a row's last bits
        # depend on its place in the tile, as on no GPU; in those every x86 has they do not.
        "OPENBLAS_CORETYPE": "Nehalem",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    command += ["-W", "ignore::RuntimeWarning"]  # numpy's, where a GPU gives infinity in silence
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    """All files, as many at a time as there are cores: each has one thread."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {tests: pool.submit(interpret, tests) for tests in TESTS}


@pytest.mark.parametrize("tests", TESTS, ids=lambda path: path.stem)
def test_a_triton_kernel_equals_its_reference_in_the_interpreter(tests: Path, runs: Runs) -> None:
    run = runs[tests].result()
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout
