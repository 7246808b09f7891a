"""A loopback server that takes uploads as the Hub does, as far as huggingface_hub asks for it.

    POST /api/repos/create                      a repository
    GET  /api/models/USER/NAME[/revision/REV]   what is in it
    POST /api/validate-yaml                     front matter of a card
    POST /api/models/USER/NAME/preupload/REV    which file goes the way of large files
    POST /USER/NAME.git/info/lfs/objects/batch  where to put large files
    PUT  /lfs/OID[/PART]                        their bytes, whole or in parts
    POST /lfs/OID                               all parts are there
    POST /verify                                a large file is there
    POST /api/models/USER/NAME/commit/REV       small files, and names of large ones
    POST /api/models/USER/NAME/paths-info/REV   sizes and hashes of files

Large files are those of 1000 bytes and more. Failures are given in advance and used up.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

LARGE_NUM_BYTES = 1000
SHA = "{:040x}"


@dataclass
class Failure:
    """A request that fails, once."""

    path: str
    """Pattern of method and path, such as "PUT /lfs"."""
    status: int | None = 500
    """What is answered; None drops the connection in the middle of the body."""


@dataclass
class Repo:
    """What has arrived."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)
    """Names of the files of each commit."""


@dataclass
class Hub:
    """The state of the server."""

    url: str = ""
    token: str = "hf_testtokenoftheserver"
    part_num_bytes: int | None = None
    """Large files are taken in parts of so many bytes."""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    """SHA-256 -> content of large files."""
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """Method and path of every request."""
    uploads: list[str] = field(default_factory=list)
    """SHA-256 of every large file that was taken, as often as it was sent."""

    def write(self, repo_id: str, folder: Path) -> Path:
        """Write the files of a repository to a folder."""
        folder.mkdir()
        for name, content in self.repos[repo_id].files.items():
            (folder / name).write_bytes(content)
        return folder


@contextmanager
def hub_server(**options: Any) -> Iterator[Hub]:
    """Run a server on a free port of this machine."""
    hub = Hub(**options)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        for failure in self.hub.failures:
            if re.search(failure.path, request):
                self.hub.failures.remove(failure)
                return self._fail(failure)
        body = self._body()
        # Large files go to a place of their own, whose address alone is the permission.
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}" and (
            self.command != "PUT" and not path.startswith("/lfs")
        ):
            return self._answer(401, {"error": "Invalid credentials"})
        for pattern, answer in _ROUTES.items():
            if match := re.fullmatch(pattern, request):
                return answer(self, body, *match.groups())
        return self._answer(404, {"error": request})

    def _fail(self, failure: Failure) -> None:
        self.close_connection = True
        if failure.status is None:
            self.rfile.read(min(100, int(self.headers.get("Content-Length") or 0)))
            self.connection.close()
            return
        self._body()
        self._answer(failure.status, {"error": "an error of the test"})

    def _body(self) -> bytes:
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, content: Any, **headers: str) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}", "id": repo_id}
        if repo_id in self.hub.repos:
            return self._answer(409, {"error": "it is there already", **url})
        is_private = asked.get("private", asked.get("visibility") == "private")
        self.hub.repos[repo_id] = Repo(is_private)
        return self._answer(200, url)

    def _info(self, body: bytes, repo_id: str) -> None:
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            return self._answer(404, {"error": "none"}, **{"X-Error-Code": "RepoNotFound"})
        return self._answer(
            200,
            {
                "id": repo_id,
                "private": repo.private,
                "sha": SHA.format(len(repo.commits)),
                "siblings": [{"rfilename": name} for name in repo.files],
            },
        )

    def _validate(self, body: bytes) -> None:
        _, front, _ = json.loads(body)["content"].split("---\n", 2)
        found = yaml.safe_load(front)
        errors = [] if isinstance(found, dict) else [{"message": "no front matter"}]
        return self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def _preupload(self, body: bytes, repo_id: str) -> None:
        repo = self.hub.repos[repo_id]
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= LARGE_NUM_BYTES else "regular",
                "shouldIgnore": False,
                "oid": _oid(repo.files.get(file["path"])),
            }
            for file in json.loads(body)["files"]
        ]
        return self._answer(200, {"files": files})

    def _batch(self, body: bytes) -> None:
        return self._answer(
            200, {"objects": [self._action(item) for item in json.loads(body)["objects"]]}
        )

    def _action(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["oid"] in self.hub.blobs:
            return item
        href, size = f"{self.hub.url}/lfs/{item['oid']}", self.hub.part_num_bytes
        upload: dict[str, Any] = {"href": href}
        if size is not None:
            num_parts = -(-item["size"] // size)
            upload["header"] = {"chunk_size": str(size)}
            upload["header"] |= {str(n): f"{href}/{n}" for n in range(1, num_parts + 1)}
        return {**item, "actions": {"upload": upload, "verify": {"href": f"{self.hub.url}/verify"}}}

    def _put(self, body: bytes, oid: str, part: str | None = None) -> None:
        if part is not None:
            self.hub.parts[oid, int(part)] = body
            return self._answer(200, {}, ETag=hashlib.md5(body).hexdigest())
        return self._take(oid, body)

    def _complete(self, body: bytes, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        return self._take(oid, b"".join(self.hub.parts[oid, number] for number in numbers))

    def _take(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            return self._answer(400, {"error": "these are other bytes"})
        self.hub.blobs[oid] = content
        self.hub.uploads.append(oid)
        return self._answer(200, {})

    def _verify(self, body: bytes) -> None:
        item = json.loads(body)
        is_there = len(self.hub.blobs.get(item["oid"], b"")) == item["size"]
        return self._answer(200 if is_there else 422, {})

    def _commit(self, body: bytes, repo_id: str) -> None:
        repo = self.hub.repos[repo_id]
        names = []
        for line in body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                continue
            if key == "deletedFile":
                del repo.files[value["path"]]
            elif key == "lfsFile":
                repo.files[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                repo.files[value["path"]] = base64.b64decode(value["content"])
            names.append(value["path"])
        repo.commits.append(names)
        oid = SHA.format(len(repo.commits))
        url = f"{self.hub.url}/{repo_id}/commit/{oid}"
        return self._answer(200, {"commitUrl": url, "commitOid": oid, "pullRequestUrl": None})

    def _paths(self, body: bytes, repo_id: str) -> None:
        from urllib.parse import parse_qs

        asked = json.loads(body) if body[:1] == b"{" else parse_qs(body.decode())
        files = self.hub.repos[repo_id].files
        found = []
        for name in asked["paths"]:
            content = files.get(name)
            if content is None:
                continue
            entry = {"type": "file", "path": name, "size": len(content), "oid": _git(content)}
            if len(content) >= LARGE_NUM_BYTES:
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
            found.append(entry)
        return self._answer(200, found)


def _git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _oid(content: bytes | None) -> str | None:
    if content is None:
        return None
    is_large = len(content) >= LARGE_NUM_BYTES
    return hashlib.sha256(content).hexdigest() if is_large else _git(content)


_NAME = r"([\w-]+/[\w.-]+)"
_ROUTES: dict[str, Any] = {
    "POST /api/repos/create": _Handler._create,
    rf"GET /api/models/{_NAME}(?:/revision/\w+)?": _Handler._info,
    "POST /api/validate-yaml": _Handler._validate,
    rf"POST /api/models/{_NAME}/preupload/\w+": _Handler._preupload,
    rf"POST /(?:{_NAME})\.git/info/lfs/objects/batch": lambda self, body, repo: self._batch(body),
    r"PUT /lfs/(\w{64})(?:/(\d+))?": _Handler._put,
    r"POST /lfs/(\w{64})": _Handler._complete,
    "POST /verify": _Handler._verify,
    rf"POST /api/models/{_NAME}/commit/\w+": _Handler._commit,
    rf"POST /api/models/{_NAME}/paths-info/\w+": _Handler._paths,
}
