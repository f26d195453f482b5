"""A hub on this machine: as much of the Hugging Face hub's interface as its own client uses to push and to pull."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_a_test"


@dataclass
class Repository:
    """Files by path of every commit, oldest first, and which commit a branch is at."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        told = json.dumps(
            [len(self.commits), sorted((path, hashlib.sha1(raw).hexdigest()) for path, raw in files.items())]
        )
        name = hashlib.sha1(told.encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name


@dataclass
class Failure:
    """An answer that the next requests get instead of the right one."""

    method: str
    path: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class State:
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    needs_token_to_read: bool = False

    def requests(self, method: str, part: str) -> list[dict[str, str]]:
        """Headers of the requests of a method whose path has a part."""
        return [headers for one, path, headers in self.seen if one == method and part in path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State

    def do_GET(self) -> None:
        self._route()

    def do_HEAD(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def _route(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.state.seen.append((self.command, path, dict(self.headers)))
        for failure in self.state.failures:
            if failure.times and failure.method == self.command and failure.path in path:
                failure.times -= 1
                self._answer(failure.status, b'{"error": "planned"}', failure.headers)
                return
        writes = self.command in ("POST", "PUT")
        signed = path.startswith("/lfs/")
        asks = (writes or self.state.needs_token_to_read) and not signed
        if asks and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, b'{"error": "Invalid credentials"}', {})
            return
        for pattern, action in ROUTES.items():
            if match := re.fullmatch(pattern, path):
                action(self, **match.groupdict())
                return
        self._answer(404, b"{}", {})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.state.repositories:
            self._json(409, {"error": "You already created this model repo", "url": f"{self._here()}/{name}"})
            return
        private = asked.get("visibility") == "private" or bool(
            asked.get("private")
        )  # as 2.x, or 1.x, of its client asks
        self.state.repositories[name] = Repository(private=private)
        self.state.repositories[name].commit({".gitattributes": b"*.bin filter=lfs\n"})
        self._json(200, {"url": f"{self._here()}/{name}", "name": name, "id": "1"})

    def validate(self) -> None:
        self._json(200, {"errors": [], "warnings": []})

    def info(self, name: str, revision: str | None = None) -> None:
        if found := self._files(name, revision or "main"):
            files = [{"rfilename": path, "size": len(raw)} for path, raw in sorted(found[1].items())]
            private = self.state.repositories[name].private
            self._json(200, {"id": name, "sha": found[0], "siblings": files, "private": private, "tags": []})

    def tree(self, name: str, revision: str) -> None:
        if found := self._files(name, revision):
            self._json(200, [self._entry(path, raw) for path, raw in sorted(found[1].items())])

    def preupload(self, name: str, revision: str) -> None:
        if self._files(name, revision):
            files = json.loads(self.body)["files"]
            told = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".bin") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for one in files
            ]
            self._json(200, {"files": told})

    def batch(self, name: str) -> None:
        objects = [
            {
                "oid": one["oid"],
                "size": one["size"],
                "actions": {
                    "upload": {"href": f"{self._here()}/lfs/{one['oid']}"},
                    "verify": {"href": f"{self._here()}/lfs/verify"},
                },
            }
            for one in json.loads(self.body)["objects"]
        ]
        self._json(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.state.objects[oid] = self.body
        self._json(200, {})

    def lfs_verify(self) -> None:
        asked = json.loads(self.body)
        known = len(self.state.objects.get(asked["oid"], b"")) == asked["size"]
        self._json(200 if known else 404, {})

    def lfs_get(self, oid: str) -> None:
        self._send(self.state.objects[oid], {"ETag": f'"{oid}"'}, oid)

    def commit(self, name: str, revision: str) -> None:
        if not (found := self._files(name, revision)):
            return
        files = dict(found[1])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", found[0]) != found[0]:
                self._answer(412, b'{"error": "A commit has happened since. Please refresh and try again."}', {})
                return
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.state.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.state.repositories[name].commit(files, revision)
        self._json(200, {"commitUrl": f"{self._here()}/{name}/commit/{commit}", "commitOid": commit, "success": True})

    def resolve(self, name: str, revision: str, path: str) -> None:
        if not (found := self._files(name, revision)):
            return
        if path not in found[1]:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        raw = found[1][path]
        headers = {"X-Repo-Commit": found[0]}
        if path.endswith(".bin"):
            oid = hashlib.sha256(raw).hexdigest()
            headers |= {"X-Linked-Size": str(len(raw)), "X-Linked-ETag": f'"{oid}"'}
            elsewhere = self._here().replace("127.0.0.1", "localhost")  # as on the hub, another host has large files
            self._answer(302, b"", {**headers, "Location": f"{elsewhere}/lfs/{oid}"})
            return
        self._send(raw, {**headers, "ETag": f'"{hashlib.sha1(raw).hexdigest()}"'}, path)

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.state.repositories.get(name)
        if repository is None:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit, repository.commits[commit]

    def _entry(self, path: str, raw: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "type": "file", "path": path, "oid": hashlib.sha1(raw).hexdigest(), "size": len(raw)
        }  # fmt: skip
        if path.endswith(".bin"):
            entry["lfs"] = {"oid": hashlib.sha256(raw).hexdigest(), "size": len(raw), "pointerSize": 134}
        return entry

    def _send(self, raw: bytes, headers: dict[str, str], what: str) -> None:
        """A file or the asked-for rest of it; broken off where a cut is planned."""
        start, stop, status = 0, len(raw), 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start = int(match[1])
            stop = min(len(raw), int(match[2]) + 1) if match[2] else len(raw)
            status = 206
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(raw)}"}
        cuts = self.state.cuts.get(what)
        if cuts and self.command == "GET":
            self._answer(status, raw[start:stop], headers, only=cuts.pop(0))
            return
        self._answer(status, raw[start:stop], {**headers, "Accept-Ranges": "bytes"})

    def _json(self, status: int, document: Any) -> None:
        self._answer(status, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str], only: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: None if only is None else abs(only)])
        if only is not None:
            self.close_connection = True
        if only is not None and only < 0:  # not ended, but torn
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _here(self) -> str:
        return f"http://{self.headers['Host']}"

    def log_message(self, *_: object) -> None:
        pass


_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
ROUTES: dict[str, Any] = {
    r"/api/repos/create": Handler.create,
    r"/api/validate-yaml": Handler.validate,
    rf"/api/models/{_NAME}": Handler.info,
    rf"/api/models/{_NAME}/revision/(?P<revision>[^/]+)": Handler.info,
    rf"/api/models/{_NAME}/tree/(?P<revision>[^/]+)/?": Handler.tree,
    rf"/api/models/{_NAME}/preupload/(?P<revision>[^/]+)": Handler.preupload,
    rf"/api/models/{_NAME}/commit/(?P<revision>[^/]+)": Handler.commit,
    rf"/{_NAME}\.git/info/lfs/objects/batch": Handler.batch,
    rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": Handler.resolve,
    r"/lfs/verify": Handler.lfs_verify,
    r"/lfs/(?P<oid>[0-9a-f]{64})": lambda self, oid: self.lfs_put(oid) if self.command == "PUT" else self.lfs_get(oid),
}


@contextmanager
def served(handler: type[BaseRequestHandler], **attributes: Any) -> Iterator[str]:
    """A server of its own thread, with attributes for its handler; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (handler,), attributes))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
