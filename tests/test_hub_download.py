"""A model that is downloaded: from a hub of our own, on a port that the system chooses."""

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from .cli import MODEL, run, write_rows

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {path.name: path.read_bytes() for path in MODEL.iterdir()} | {"model.bin": b"never"}


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
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/tiny/revision/"):
            siblings = [{"rfilename": name} for name in FILES]
            body = json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode()
        elif path == f"/api/models/org/tiny/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": _hash(content)}
                for name, content in FILES.items()
            ]
            body = json.dumps(tree).encode()
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            body = FILES[path.rpartition("/")[2]]
            self.server.fetched.add(path.rpartition("/")[2])  # type: ignore[attr-defined]
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


def test_a_quiet_download_is_silent_and_fetches_what_is_needed(
    hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "Q: 1+4=\nA:"}])
    online = {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HOME": str(tmp_path / "cache"),
    }
    generate = partial(run, "generate", rows, "--model", "org/tiny", "--max-tokens", "2")
    ended = generate("-o", tmp_path / "out.jsonl", "--quiet", env=online)
    assert (ended.code, ended.stdout, ended.stderr) == (0, b"", "")
    assert hub.fetched == FILES.keys() - {"model.bin"}  # type: ignore[attr-defined]
    again = generate("--offline", env={**online, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert again.code == 0, again.stderr
    assert again.rows[0]["completion"]
