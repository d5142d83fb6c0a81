"""A model that is downloaded: from a hub of our own, on a port that the system chooses."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from .cli import MODEL, Run, environment, run, write_rows

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {path.name: path.read_bytes() for path in MODEL.iterdir()} | {"model.bin": b"never"}
CONFIG = json.loads(FILES["config.json"])


def with_config(**values: Any) -> dict[str, bytes]:
    """The files of the sample model, of another config."""
    return FILES | {"config.json": json.dumps(CONFIG | values).encode()}


REPOSITORIES = {
    "org/tiny": FILES,
    "org/llama": with_config(architectures=["LlamaForCausalLM"]),
    "org/fp8": with_config(quantization_config={"quant_method": "fp8"}),
    "org/sizes": with_config(hidden_size="192"),
    "org/sampling": FILES | {"generation_config.json": b'{"temperature": "hot"}'},
    "org/lora": {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"},
    "org/gguf": {"Q8_0.gguf": b"GGUF", "README.md": b"never"},
}
# What the hub answers for those that it does not give, with its X-Error-Code.
REFUSED = {
    "org/gated": (403, "GatedRepo"),
    "org/none": (401, "RepoNotFound"),
    "Qwen/Qwen3-06B": (404, "RepoNotFound"),
    "org/broken": (500, ""),
}


class Hub(BaseHTTPRequestHandler):
    """What the hub's client asks of one repository."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""

    def _answer(self, *, has_body: bool) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/models").removeprefix("/")
        repository, _, rest = path.partition("/")
        name, _, rest = rest.partition("/")
        repository = f"{repository}/{name}"
        if repository in REFUSED or rest == "revision/v9":
            status, code = REFUSED.get(repository, (404, "RevisionNotFound"))
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        files = REPOSITORIES.get(repository, {})
        if rest.startswith("revision/"):
            siblings = [{"rfilename": name} for name in files]
            body = json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode()
        elif rest == f"tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": _hash(content)}
                for name, content in files.items()
            ]
            body = json.dumps(tree).encode()
        elif rest.startswith(f"resolve/{COMMIT}/"):
            body = files[rest.rpartition("/")[2]]
            self.server.fetched.add(rest.rpartition("/")[2])  # type: ignore[attr-defined]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{_hash(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if has_body:
            self.wfile.write(body)


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.fetched = set()  # type: ignore[attr-defined]
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def online(hub: ThreadingHTTPServer, folder: Path) -> dict[str, str]:
    """An environment where `hub` is the hub."""
    return {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HOME": str(folder / "cache"),
    }


RESOLVE = """
import os, pwd, sys

def unknown(uid):  # as in a container without /etc/passwd
    raise KeyError("getpwuid(): uid not found")

if os.environ.pop("NO_HOME", None):
    del os.environ["HOME"], os.environ["HF_HOME"]
    pwd.getpwuid = unknown

from nanovllm_cli.models import resolve_model, resolve_tokenizer
from nanovllm_cli.run_job import run_job

def job():
    resolve = resolve_tokenizer if "tokenizer" in sys.argv else resolve_model
    print(resolve(sys.argv[1]))
    return 0

sys.exit(run_job(job, debug=False))
"""


def resolve(hub: ThreadingHTTPServer, folder: Path, *arguments: str, **env: str) -> Run:
    """What a job's first look for its model ends with, without the job."""
    ended = subprocess.run(
        [sys.executable, "-c", RESOLVE, *arguments],
        capture_output=True,
        env=environment(**{**online(hub, folder), **env}),
        timeout=60,
    )
    return Run(code=ended.returncode, stdout=ended.stdout, stderr=ended.stderr.decode())


def test_a_quiet_download_is_silent_and_fetches_what_is_needed(
    hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "Q: 1+4=\nA:"}])
    generate = partial(run, "generate", rows, "--model", "org/tiny", "--max-tokens", "2")
    ended = generate("-o", tmp_path / "out.jsonl", "--quiet", env=online(hub, tmp_path))
    assert (ended.code, ended.stdout, ended.stderr) == (0, b"", "")
    assert hub.fetched == FILES.keys() - {"model.bin"}  # type: ignore[attr-defined]
    again = generate(
        "--offline", env={**online(hub, tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    )
    assert again.code == 0, again.stderr
    assert again.rows[0]["completion"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/llama", "LlamaForCausalLM"),
        ("org/fp8", "quantized (quantization_config: quant_method fp8)"),
        ("org/sizes", "hidden_size = '192'"),
        ("org/sampling", "temperature = 'hot'"),
        ("org/lora", "does not apply adapters"),
        ("org/gguf", "has no config.json on the hub"),
    ],
)
def test_what_cannot_run_is_refused_before_its_weights_are_fetched(
    name: str, words: str, hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    ended = resolve(hub, tmp_path, name)
    assert ended.code == 65, ended
    assert words in ended.stderr
    fetched = hub.fetched  # type: ignore[attr-defined]
    assert not [file for file in fetched if not file.endswith(".json")]


def test_a_tokenizer_of_any_model_is_fetched_without_weights(
    hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    ended = resolve(hub, tmp_path, "org/llama", "tokenizer")
    assert ended.code == 0, ended
    folder = Path(ended.stdout.decode().strip())
    assert (folder / "tokenizer.json").read_bytes() == FILES["tokenizer.json"]
    assert "model.safetensors" not in hub.fetched  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("org/gated", "accept a licence", "HF_TOKEN"),
        ("org/none", "no such model", "HF_TOKEN"),
        ("Qwen/Qwen3-06B", "no such model", "Did you mean Qwen/Qwen3-0.6B?"),
        ("org/tiny@v9", "no revision 'v9'", "tree/main"),
        ("org/broken", "the hub (it answers 500)", "hf download org/broken"),
    ],
)
def test_what_the_hub_does_not_give_is_66_with_what_to_do(
    name: str, message: str, hint: str, hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    ended = resolve(hub, tmp_path, name)
    assert (ended.code, ended.stdout) == (66, b"")
    told, _, advice = ended.stderr.partition("hint: ")
    assert message in told
    assert hint in advice
    for noise in ("Error", "huggingface_hub", "Traceback"):
        assert noise not in ended.stderr


def test_a_hub_that_cannot_be_reached_is_told(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    ended = resolve(hub, tmp_path, "org/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert ended.code == 66, ended
    assert "the hub (it cannot be reached)" in ended.stderr
    assert "hf download org/tiny" in ended.stderr
    assert "Error" not in ended.stderr


@pytest.mark.parametrize("offline", ["0", "1"])
def test_without_a_home_there_is_no_cache_and_it_is_told(
    offline: str, hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    ended = resolve(hub, tmp_path, "org/tiny", NO_HOME="1", HF_HUB_OFFLINE=offline)
    assert ended.code == 66, ended
    assert "no home directory" in ended.stderr
    assert "HF_HOME" in ended.stderr
    assert not hub.fetched  # type: ignore[attr-defined]
