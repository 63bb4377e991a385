"""A server on loopback that answers as the hub does: its client reads data sets, and uploads models."""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """repos: of each data set or model the files of each commit. refs: the commit that a branch or tag of it leads to.

    An upload takes the token hf_writer; hf_reader may not write, and any other is not valid.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.uploaded: dict[str, bytes] = {}  # large files, by their SHA-256
        self.num_broken = 0  # of the next answers with a body, how many break in the middle

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repo: str, files: dict[str, bytes], ref: str = "main") -> str:
        sha = hashlib.sha1(repr((repo, sorted(files.items()), len(self.repos.get(repo, ())))).encode()).hexdigest()
        self.repos.setdefault(repo, {})[sha] = files
        self.refs.setdefault(repo, {})[ref] = sha
        return sha

    def kinds(self) -> Counter[str]:
        """How many requests of which kind there were."""
        kind = re.compile(r"(\w+) /(?:api/)?datasets/.*?/(revision|tree|resolve)/")
        return Counter(f"{found[1]} {found[2]}" for request in self.requests if (found := kind.match(request)))


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.server.uploaded[self.path.rpartition("/")[2]] = self.body()
        self.give_json({})

    def do_POST(self) -> None:
        hub, body = self.server, self.body()
        hub.requests.append(f"{self.command} {self.path}")
        token = self.headers.get("Authorization", "")
        if token != "Bearer hf_writer":
            return self.refuse(403 if token == "Bearer hf_reader" else 401, "")
        if self.path == "/api/validate-yaml":
            return self.give_json({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            return self.give_json({"url": f"{hub.url}/{wanted['organization']}/{wanted['name']}"})
        found = re.fullmatch(
            r"/(?:api/models/)?([^/]+/[^/.]+)(?:\.git/info/lfs/objects)?/(preupload|batch|commit).*", self.path
        )
        assert found is not None, self.path
        repo, kind = found.groups()
        if kind == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in files]
            pairs = zip(files, modes, strict=True)
            return self.give_json(
                {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in pairs]}
            )
        if kind == "batch":
            return self.give_json(
                {
                    "transfer": "basic",
                    "objects": [
                        one | {"actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
                        for one in json.loads(body)["objects"]
                    ],
                }
            )
        lines = [json.loads(line) for line in body.splitlines()]
        committed = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            if line["key"] == "file"
            else hub.uploaded[line["value"]["oid"]]
            for line in lines
            if line["key"] != "header"
        }
        sha = hub.commit(repo, committed)
        self.give_json({"commitUrl": f"{hub.url}/{repo}/commit/{sha}", "commitOid": sha})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def answer(self) -> None:
        hub = self.server
        hub.requests.append(f"{self.command} {self.path}")
        found = re.fullmatch(
            r"/(?:api/)?datasets/([^/]+/[^/]+)/(revision|tree|resolve)/([^/?]+)/?([^?]*)(?:\?.*)?", self.path
        )
        if found is None:
            return self.refuse(404, "EntryNotFound")
        hub.tokens.add(self.headers.get("Authorization", ""))
        repo, kind, revision, path = found.groups()
        revision = revision.replace("%2F", "/")
        if repo not in hub.repos:
            return self.refuse(401, "RepoNotFound")
        sha = hub.refs[repo].get(revision, revision)
        if sha not in hub.repos[repo]:
            return self.refuse(404, "RevisionNotFound")
        if repo in hub.gated and not self.headers.get("Authorization"):
            return self.refuse(401, "GatedRepo")
        files = hub.repos[repo][sha]
        if kind == "revision":
            return self.give_json({"id": repo, "sha": sha, "siblings": [], "tags": [], "private": False})
        if kind == "tree":
            oids = {name: hashlib.sha1(data).hexdigest() for name, data in files.items()}
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": oids[name]} for name, data in files.items()
            ]
            return self.give_json(entries)
        if path not in files:
            return self.refuse(404, "EntryNotFound")
        self.give(files[path], {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(files[path]).hexdigest()}"'})

    def give_json(self, value: object) -> None:
        self.give(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def give(self, body: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        part = body[int(wanted[1]) : int(wanted[2] or len(body)) + 1] if wanted else body
        self.send_response(206 if wanted else 200)
        for name, value in {"Accept-Ranges": "bytes", "Content-Length": str(len(part)), **headers}.items():
            self.send_header(name, value)
        if wanted:
            self.send_header("Content-Range", f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(body)}")
        self.end_headers()
        if self.command != "HEAD":
            if self.server.num_broken:
                self.server.num_broken -= 1
                part, self.close_connection = part[: len(part) // 2], True
            self.wfile.write(part)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
