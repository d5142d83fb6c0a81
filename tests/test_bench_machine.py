"""What a record says of its machine: the commit, the clock, NVIDIA's counters."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nanovllm_cli.core.machine_rates import cpu_rates
from nanovllm_cli.machine import device_name, git_commit, gpu_counters, software
from nanovllm_cli.nvml import Nvml

from .cli import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_a_commit_is_read_from_a_checkout_a_packed_one_and_a_worktree(tmp_path: Path) -> None:
    git = tmp_path / "here" / ".git"
    assert git_commit(tmp_path / "here") is None
    write(git / "HEAD", COMMIT)
    assert git_commit(tmp_path / "here") == COMMIT
    write(git / "HEAD", "ref: refs/heads/main")
    assert git_commit(tmp_path / "here") is None
    write(git / "packed-refs", f"# pack-refs with: peeled\n{COMMIT} refs/heads/main")
    assert git_commit(tmp_path / "here") == COMMIT
    write(git / "refs/heads/main", COMMIT[::-1])
    assert git_commit(tmp_path / "here") == COMMIT[::-1]
    write(git / "worktrees/there/HEAD", "ref: refs/heads/main")
    write(git / "worktrees/there/commondir", "../..")
    write(tmp_path / "there" / ".git", f"gitdir: {git / 'worktrees/there'}")
    assert git_commit(tmp_path / "there") == COMMIT[::-1]


@pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="no checkout, or no git"
)
def test_the_commit_of_this_checkout_is_the_one_that_git_names() -> None:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    named = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert git_commit(ROOT) == named


def test_the_clock_starts_with_the_process() -> None:
    code = (
        "import time; time.sleep(0.5); start = time.perf_counter()\n"
        "from nanovllm_cli.process_clock import seconds_since_process_start\n"
        "print(seconds_since_process_start() - (time.perf_counter() - start))"
    )
    before = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tick = 1 / os.sysconf("SC_CLK_TCK")  # the kernel counts in these
    assert 0.5 <= float(run.stdout) < time.perf_counter() - before + tick


def test_a_machine_without_nvml_has_no_counters() -> None:
    assert gpu_counters("cpu") is None
    nowhere = Nvml("00000000-0000-0000-0000-000000000000")  # a GPU that no machine has
    assert nowhere.joules() is None
    if not torch.cuda.is_available():
        assert nowhere.driver_version() is None
        assert software(None)["driver"] is None


_FAKE_NVML = """
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    strncpy(text, "999.1", size);
    return 0;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    *device = (void *)(1ull << 40);  /* more than 32 bits must come back */
    return strcmp(uuid, "GPU-1234") != 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
    *millijoules = 5000000001500ull;
    return device != (void *)(1ull << 40);
}
"""
_FAKE_LINKS = """
#include <string.h>
int nvmlInit_v2(void) { return 0; }
/* GPUs 0 and 1 are linked, 2 is behind another NUMA node, nothing is known of 3. */
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    *device = (void *)((1ull << 40) + uuid[4]);
    return uuid[4] == 'x';
}
int nvmlDeviceGetP2PStatus(void *a, void *b, int index, int *status) {
    int first = (char)(long long)a, second = (char)(long long)b;
    *status = !(index == 2 && first + second == '0' + '1');
    return second == '3';
}
int nvmlDeviceGetTopologyCommonAncestor(void *a, void *b, int *level) {
    *level = 50;
    return (char)(long long)b == '3';
}
int nvmlDeviceGetNvLinkState(void *device, unsigned link, int *is_up) {
    *is_up = link != 1;
    return link < 4 ? 0 : 2;
}
"""


def with_library(folder: Path, source: str, code: str) -> subprocess.CompletedProcess[bytes]:
    """Run some Python where NVML is made of `source`."""
    (folder / "nvml.c").write_text(source)
    command = ["cc", "-shared", "-fPIC", "-o", "libnvidia-ml.so.1", "nvml.c"]
    subprocess.run(command, cwd=folder, check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_energy_and_driver_are_what_the_library_says(tmp_path: Path) -> None:
    code = (
        "from nanovllm_cli.nvml import Nvml\n"
        "for uuid in '1234', 'GPU-1234', 'other':\n"
        "    print(Nvml(uuid).driver_version(), Nvml(uuid).joules())\n"
        "print(Nvml('1234', 'GPU-1234').joules(), Nvml('1234', 'other').joules(), Nvml().joules())"
    )
    run = with_library(tmp_path, _FAKE_NVML, code)
    known, unknown = b"999.1 5000000001.5", b"999.1 None"
    several = b"10000000003.0 None 0.0"
    assert run.stdout.splitlines() == [known, known, unknown, several], run.stderr


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_what_connects_two_gpus_is_what_the_library_says(tmp_path: Path) -> None:
    code = (
        "from nanovllm_cli.nvml import Nvml\n"
        "nvml = Nvml('0', '1', '2', '3', 'x')\n"
        "for pair in (0, 1), (0, 2), (0, 3), (0, 4): print(nvml.path(*pair))"
    )
    run = with_library(tmp_path, _FAKE_LINKS, code)
    assert run.stdout.decode().splitlines() == [
        "NVLink (3 links a GPU)", "PCIe from one NUMA node to another", "None", "None"
    ], run.stderr  # fmt: skip


def test_a_cpu_has_a_name_and_rates() -> None:
    assert device_name("cpu")
    rates = cpu_rates(1)
    assert 1e8 < rates.bytes_per_second < 1e13
    assert 1e8 < rates.flops_per_second < 1e15
    assert torch.get_num_threads() == 1


@pytest.mark.gpu
def test_a_gpu_reads_faster_than_it_copies_and_counts_its_energy() -> None:
    from nanovllm_cli.core.machine_rates import gpu_rates

    rates = gpu_rates(torch.bfloat16)
    buffer = torch.rand(1 << 28, device="cuda")
    copy = torch.empty_like(buffer)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    copy.copy_(buffer)
    events[0].record()
    copy.copy_(buffer)
    events[1].record()
    torch.cuda.synchronize()
    copied = 2 * buffer.nbytes / (events[0].elapsed_time(events[1]) / 1000)
    assert 0.95 * copied < rates.bytes_per_second < 1.5 * copied
    assert rates.flops_per_second > 1e13
    counters = gpu_counters("cuda")
    assert counters is not None
    assert counters.driver_version()
    before = counters.joules()
    time.sleep(0.5)
    after = counters.joules()
    assert before is None or after is None or after > before
