"""A Hugging Face Hub on this machine: enough of its HTTP interface to make a repository, upload, list and download."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_this_test"


class FakeHub(ThreadingHTTPServer):
    """Repositories by name, each with its files by commit; private ones are seen with the token alone."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        self.asked: list[str] = []

    def commit(self, repo: str, added: dict[str, bytes]) -> str:
        """Add files to a repository's last commit; returns the new one's name."""
        history = self.commits[repo]
        files = (history[-1][1] if history else {}) | added
        sha = hashlib.sha1(f"{repo} {len(history)}".encode()).hexdigest()
        history.append((sha, files))
        return sha

    def files(self, repo: str) -> dict[str, bytes]:
        """The newest files of a repository."""
        return self.commits[repo][-1][1]

    def environment(self, home: Path) -> dict[str, str]:
        """What sends huggingface_hub here, with its cache in a folder."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Nothing on the screen."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            repo, what, revision = found.groups()
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, what = found.groups()
        else:
            return self.refuse(404, "EntryNotFound", path)
        if repo not in self.server.commits or (repo in self.server.private and not self.is_known()):
            return self.refuse(401, "RepoNotFound", "Repository Not Found")
        named = {sha: (sha, files) for sha, files in self.server.commits[repo]}
        commit = named.get(revision) if revision not in (None, "main") else self.server.commits[repo][-1]
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        sha, files = commit
        if what == "tree":
            return self.answer([{"type": "file", "path": name, "size": len(data), "oid": oid(data)}
                                for name, data in files.items()])  # fmt: skip
        if what in (None, "revision"):
            return self.answer({"id": repo, "modelId": repo, "sha": sha, "private": repo in self.server.private,
                                "siblings": [{"rfilename": name} for name in files]})  # fmt: skip
        if what not in files:
            return self.refuse(404, "EntryNotFound", f"no {what}")
        return self.send(200, files[what], {"ETag": f'"{oid(files[what])}"', "X-Repo-Commit": sha})

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if not self.is_known():
            return self.refuse(401, "Unauthorized", "Invalid username or password.")
        if path == "/api/repos/create":
            options = json.loads(body)
            repo = "/".join(filter(None, (options.get("organization"), options["name"])))
            if options.get("private") or options.get("visibility") == "private":
                self.server.private.add(repo)
            if repo in self.server.commits:
                return self.refuse(409, "Conflict", "You already created this model repo", f"{self.server.url}/{repo}")
            self.server.commits[repo] = []
            self.server.commit(repo, {".gitattributes": b"x"})
            return self.answer({"url": f"{self.server.url}/{repo}", "id": repo, "name": repo})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if not found or found[1] not in self.server.commits:
            return self.refuse(404, "RepoNotFound", path)
        if found[2] == "preupload":
            return self.answer({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                          for file in json.loads(body)["files"]]})  # fmt: skip
        lines = [json.loads(line) for line in body.splitlines()]
        added = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        sha = self.server.commit(found[1], added)
        url = f"{self.server.url}/{found[1]}/commit/{sha}"
        return self.answer({"success": True, "commitOid": sha, "commitUrl": url})

    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def answer(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str, message: str, url: str = "") -> None:
        self.send(status, json.dumps({"error": message, "url": url}).encode(),
                  {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"})  # fmt: skip

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def oid(data: bytes) -> str:
    """The name that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that answers while it lasts."""
    with FakeHub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
