"""A stand-in of the Hugging Face hub's HTTP interface on this machine: users, repositories, commits, large files, downloads.

What huggingface_hub 2.4 asks for, without its xet storage (HF_HUB_DISABLE_XET=1): large files take the older LFS route.
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
from urllib.parse import unquote, urlsplit

import yaml

USERS = {"ada": ["ada", "lab"]}  # users, and where they may write
LARGE = (".safetensors", ".onnx", ".bin")


@dataclass
class Repo:
    """A repository: its commits, oldest first, each an id and its files."""

    private: bool = False
    gated: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        content = repr((len(self.commits), sorted((path, blob_id(data)) for path, data in files.items())))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits.append((sha, files))
        return sha

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass
class Hub:
    """What the stand-in holds, and the requests that reached it.

    tokens: user and role (`read` or `write`) by token. requests: methods and paths of all requests.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    tokens: dict[str, tuple[str, str]] = field(
        default_factory=lambda: {"hf_write": ("ada", "write"), "hf_read": ("ada", "read")}
    )
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def environment(self, home: Path, token: str | None = "hf_write", **more: str) -> dict[str, str]:
        """Environment of a process that uses this hub. home: its cache and login."""
        environment = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return {**environment, "HF_TOKEN": token or "", **more}


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run a hub without repositories."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def blob_id(data: bytes) -> str:
    """The id of a small file in git."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.route()

    def do_HEAD(self) -> None:
        self.route()

    def do_POST(self) -> None:
        self.route()

    def do_PUT(self) -> None:
        self.route()

    def route(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        if "Authorization" in self.headers and not self.user:
            self.refuse(401, "Invalid credentials in Authorization header")
            return
        for pattern, answer in ROUTES.items():
            if match := re.fullmatch(pattern, path):
                getattr(self, answer)(*map(unquote, match.groups()))
                return
        self.answer({"error": "no such address"}, 404)

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, message: str, code: str = "") -> None:
        more = {"X_Error_Code": code} if code else {}
        self.answer({"error": message}, status, X_Error_Message=message, **more)

    @property
    def user(self) -> tuple[str, str] | None:
        return self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def may_write(self, name: str) -> bool:
        user, role = self.user or ("", "")
        if role == "write" and name.partition("/")[0] in USERS.get(user, []):
            return True
        self.refuse(403, "you may not write there")
        return False

    def find(self, name: str) -> Repo | None:
        """The repository, if the user may see it; else the refusal is sent."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.user):
            self.refuse(404 if self.user else 401, "Repository not found", "RepoNotFound")
            return None
        return repo

    def whoami(self) -> None:
        if self.user is None:
            self.refuse(401, "Invalid credentials in Authorization header")
            return
        name, role = self.user
        orgs = [{"name": owner} for owner in USERS[name] if owner != name]
        self.answer({"type": "user", "name": name, "orgs": orgs, "auth": {"accessToken": {"role": role}}})

    def create(self) -> None:
        body = json.loads(self.body)
        name = f"{body['organization']}/{body['name']}"
        if not self.may_write(name):
            return
        if name in self.hub.repos:
            self.answer({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
            return
        self.hub.repos[name] = Repo(private=body.get("visibility") == "private")
        self.hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer({"url": f"{self.hub.url}/{name}"})

    def validate(self) -> None:
        head = json.loads(self.body)["content"].split("---\n")[1]
        good = isinstance(yaml.safe_load(head), dict)
        self.answer({"errors": [] if good else [{"message": "no metadata"}], "warnings": []}, 200 if good else 400)

    def info(self, name: str, revision: str | None = None) -> None:
        if (repo := self.find(name)) is None:
            return
        snapshot = repo.files(revision or "main")
        if snapshot is None:
            self.refuse(404, "Invalid rev id", "RevisionNotFound")
            return
        siblings = [{"rfilename": path} for path in snapshot[1]]
        self.answer({"id": name, "sha": snapshot[0], "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, name: str, revision: str) -> None:
        repo = self.find(name)
        if repo is None or (snapshot := repo.files(revision)) is None:
            return
        listed = []
        for path, data in snapshot[1].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            listed.append(entry)
        self.answer(listed)

    def preupload(self, name: str, revision: str) -> None:
        repo = self.find(name)
        if repo is None or not self.may_write(name):
            return
        there = repo.commits[-1][1]
        modes = []
        for file in json.loads(self.body)["files"]:
            path, data = file["path"], there.get(file["path"])
            large = path.endswith(LARGE)
            old = None if data is None else hashlib.sha256(data).hexdigest() if large else blob_id(data)
            modes.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": old})
        self.answer({"files": modes})

    def batch(self, name: str) -> None:
        if not self.may_write(name):
            return
        objects = []
        for each in json.loads(self.body)["objects"]:
            place = {"href": f"{self.hub.url}/lfs/{each['oid']}"}
            new = each["oid"] not in self.hub.large
            objects.append({**each, **({"actions": {"upload": place, "verify": place}} if new else {})})
        self.answer({"transfer": "basic", "objects": objects})

    def lfs(self, oid: str) -> None:
        if self.command == "PUT":
            assert hashlib.sha256(self.body).hexdigest() == oid
            self.hub.large[oid] = self.body
        self.answer({}, 200 if oid in self.hub.large else 404)

    def commit(self, name: str, revision: str) -> None:
        repo = self.find(name)
        if repo is None or not self.may_write(name):
            return
        files = dict(repo.commits[-1][1])
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files)
        self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (repo := self.find(name)) is None:
            return
        snapshot = repo.files(revision)
        if snapshot is None:
            self.refuse(404, "Invalid rev id", "RevisionNotFound")
        elif repo.gated:
            self.refuse(403, "Access to this model is restricted", "GatedRepo")
        elif path not in snapshot[1]:
            self.refuse(404, "Entry not found", "EntryNotFound")
        elif path.endswith(LARGE):
            oid = hashlib.sha256(snapshot[1][path]).hexdigest()
            size = str(len(snapshot[1][path]))
            place = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{oid}"  # another host, which gets no token
            self.answer(
                b"", 302, Location=place, X_Repo_Commit=snapshot[0], X_Linked_Etag=f'"{oid}"', X_Linked_Size=size
            )
        else:
            self.answer(snapshot[1][path], X_Repo_Commit=snapshot[0], ETag=f'"{blob_id(snapshot[1][path])}"')

    def cdn(self, oid: str) -> None:
        assert "Authorization" not in self.headers
        self.answer(self.hub.large[oid], ETag=f'"{oid}"')


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    "/api/whoami-v2": "whoami",
    "/api/repos/create": "create",
    "/api/validate-yaml": "validate",
    f"/api/models/{NAME}": "info",
    f"/api/models/{NAME}/revision/(.+)": "info",
    f"/api/models/{NAME}/tree/([^/]+)": "tree",
    f"/api/models/{NAME}/preupload/([^/]+)": "preupload",
    f"/api/models/{NAME}/commit/([^/]+)": "commit",
    f"/{NAME}.git/info/lfs/objects/batch": "batch",
    "/lfs/([0-9a-f]+)": "lfs",
    "/cdn/([0-9a-f]+)": "cdn",
    f"/{NAME}/resolve/([^/]+)/(.+)": "resolve",
}
