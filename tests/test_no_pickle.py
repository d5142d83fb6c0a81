"""What the sources must not hold: ways to run what a file or a message says, names two jobs share.

Ranks and processes talk through inherited descriptors; weights are safetensors.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(file for name in ("nanovllm_cli", "core", "kernels")
                 for file in (ROOT / name).glob("*.py"))  # fmt: skip

FORBIDDEN = {
    "runs what it reads": (
        r"\b(c?[Pp]ickle|cloudpickle|dill|marshal|shelve|joblib)\b|\btorch\.(load|save)\b|allow_pickle"
        r"|(?<![\w.])(eval|exec|compile)\(|\btrust_remote_code\b(?!=False)|\bAutoModel\w*\b|\bshell=True"
    ),
    "pickles what it hands on": r"\bmultiprocessing\b|\bmp\.(spawn|Process|Queue)\b"
    r"|\b(send|recv|broadcast|gather)\w*_object\w*",
    "has a name that two jobs would share": r"\bSharedMemory\b|\bshm_open\b|/dev/shm/|\bmkfifo\b",
    "has a port that two jobs would share": (
        r"\b(MASTER_PORT|MASTER_ADDR|TCPStore)\b|tcp://|\bAF_INET6?\b|\b(bind|listen)\("
        r"|\bport\s*=\s*\d"
    ),
}


@pytest.mark.parametrize("why", FORBIDDEN)
def test_no_source(why: str) -> None:
    assert len(SOURCES) > 50
    found = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for file in SOURCES
        for line in file.read_text().splitlines()
        if not line.lstrip().startswith("#") and re.search(FORBIDDEN[why], line)
    ]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from cPickle import loads", "x = torch.load(file)", "y = eval(text)",
        "from_pretrained(x, trust_remote_code=True)",
        "exec(code)", "np.load(f, allow_pickle=True)", "from multiprocessing import Queue",
        "mp.spawn(run)", "dist.broadcast_object_list(x)", 'SharedMemory(name="nanovllm")',
        'init_process_group("nccl", "tcp://localhost:2333")', "sock.bind(address)", "port=2333",
        'os.environ["MASTER_PORT"] = "2333"', "AutoModelForCausalLM.from_pretrained(p)",
    ],
)  # fmt: skip
def test_these_would_be_found(line: str) -> None:
    assert any(re.search(pattern, line) for pattern in FORBIDDEN.values())


@pytest.mark.parametrize("line", ["model.eval()", "re.compile(x)", "exit_code = 2", "evaluate(x)"])
def test_these_are_no_offence(line: str) -> None:
    assert not any(re.search(pattern, line) for pattern in FORBIDDEN.values())
