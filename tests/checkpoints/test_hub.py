"""References to models: folders, and ids on a hub played by a little server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.hub import resolve
from ktmerge.errors import UsageError

MakeCheckpoint = Callable[..., Path]


def test_a_folder_relative_to_the_given_one(make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_checkpoint("runs/spam")
    assert resolve("runs/spam", root.parent.parent) == root
    assert resolve("./spam", root.parent) == root
    assert resolve("../runs/spam", root.parent).samefile(root)
    assert resolve(str(root), Path("/elsewhere")) == root
    monkeypatch.setenv("HOME", str(root.parent.parent))
    assert resolve("~/runs/spam", Path("/elsewhere")) == root


def test_a_file_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(UsageError, match=r"model\.safetensors: is a file; give the folder"):
        resolve("model.safetensors", make_checkpoint())


@pytest.mark.parametrize(
    "reference", ["./runs/spma", "runs/spma", "../place/runs/spma", "a b/c", "/no/such/folder", "x"]
)
def test_what_is_neither_folder_nor_id(make_checkpoint: MakeCheckpoint, reference: str) -> None:
    place = make_checkpoint("place/runs/spam").parent.parent
    with pytest.raises(UsageError, match="no such folder") as caught:
        resolve(reference, place)
    assert ("Did you mean 'spam'?" in str(caught.value)) == ("spma" in reference)


@pytest.mark.parametrize("reference", ["x" * 300, "~nobody-of-this-name/model"])
def test_what_cannot_even_be_looked_up(tmp_path: Path, reference: str) -> None:
    with pytest.raises(UsageError, match="cannot be looked up"):
        resolve(reference, tmp_path)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as fetching a snapshot takes."""

    folder: Path
    sha = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/gated" in path:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif "/private" in path:
            self.answer(401, b"{}", {})
        elif "/down" in path:
            self.answer(500, b"{}", {})
        elif "org/tiny" not in path:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/revision/nope" in path:
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif "/api/models/org/tiny/tree/" in path:
            tree = [self.entry(file) for file in sorted(self.folder.iterdir())]
            self.answer(200, json.dumps(tree).encode(), {})
        elif path.startswith("/api/models/org/tiny"):
            self.answer(200, json.dumps({"id": "org/tiny", "sha": self.sha, "siblings": []}).encode(), {})
        else:
            data = (self.folder / path.rpartition("/")[2]).read_bytes()
            etag = hashlib.sha1(data).hexdigest()
            self.answer(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": self.sha})

    @staticmethod
    def entry(file: Path) -> dict[str, object]:
        oid = hashlib.sha1(file.read_bytes()).hexdigest()
        return {"type": "file", "path": file.name, "oid": oid, "size": file.stat().st_size}

    def answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(make_checkpoint: MakeCheckpoint) -> Iterator[str]:
    folder = make_checkpoint(
        "served", files={"tokenizer.json": "{}", "pytorch_model.bin": "p", "chat_template.jinja": "x"}
    )
    (folder / "consolidated.safetensors").write_bytes(b"the same again")
    handler = type("ServedHub", (Hub,), {"folder": folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(endpoint: str, home: Path, *references: str, offline: bool = False) -> list[str]:
    """Resolve in a process of its own, since the hub's library reads its settings at import."""
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from ktmerge.checkpoints.hub import resolve\nfrom ktmerge.errors import UsageError\n"
        "for reference in sys.argv[1:]:\n"
        "    try:\n        print(resolve(reference, Path('/nowhere')))\n"
        "    except UsageError as error:\n        print('refused:', error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1" if offline else "0"}
    environment |= {"HF_HUB_ETAG_TIMEOUT": "600", "HF_HUB_DOWNLOAD_TIMEOUT": "600"}  # the machine may be busy
    environment |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", script, *references]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=1200)
    assert done.stderr == "", "nothing is drawn where there is no terminal"
    lines = done.stdout.splitlines()
    assert len(lines) == len(references), done.stdout + done.stderr
    return lines


@pytest.mark.slow
def test_a_hub_id_is_fetched_once_and_then_found_offline(hub: str, tmp_path: Path) -> None:
    found = ask(hub, tmp_path / "home", "org/tiny", "org/tiny@main")
    assert found[0] == found[1]
    checkpoint = Checkpoint.open(Path(found[0]))
    assert checkpoint.content_digest() == Checkpoint.open(tmp_path / "served").content_digest()
    assert checkpoint.other_files == ("chat_template.jinja", "config.json", "tokenizer.json")
    assert checkpoint.left_behind == ()
    assert ask(hub, tmp_path / "home", "org/tiny", offline=True) == found[:1]


@pytest.mark.slow
def test_refusals_of_the_hub_are_one_sentence(hub: str, tmp_path: Path) -> None:
    fetched, gated, private, unknown, revision, down, malformed = ask(
        hub, tmp_path / "home",
        "org/tiny", "org/gated", "org/private", "org/none", "org/tiny@nope", "org/down", "org/a..b",
    )  # fmt: skip
    assert Checkpoint.open(Path(fetched)).tensors
    assert "org/gated" in gated
    assert "is gated on the hub; accept its terms there" in gated
    assert "is refused by the hub (HTTP 401); log in" in private
    assert "is not on the hub, or is private" in unknown
    assert "has no revision 'nope' on the hub" in revision
    assert "the hub cannot be reached" in down
    assert "could not be downloaded" in malformed
    for line in (gated, private, unknown, revision, down, malformed):
        assert line.startswith("refused: org/")


@pytest.mark.slow
def test_without_the_hub(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        (unreachable,) = ask(endpoint, tmp_path, "org/tiny")
        (offline,) = ask(endpoint, tmp_path, "org/tiny", offline=True)
    for line in (unreachable, offline):
        assert line.startswith("refused: org/tiny: ")
        assert "is not in the local cache, and the hub cannot be reached" in line
