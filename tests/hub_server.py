"""A server on the loopback that speaks as much of the Hub's HTTP API as its client needs, over a folder."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"


class HubServer(ThreadingHTTPServer):
    """Repositories with branches; files are kept by their SHA-256, as Git LFS does.

    Attributes:
        repos: By id: what each branch holds, file name to digest.
        requests: What was asked, ``"METHOD /path"``.
        faults: ``(pattern of "METHOD /path", what to do, how often)``: answer an HTTP status, ``"cut"`` the connection
            half-way, or ``"corrupt"`` what is sent.
        files: Other addresses, such as an origin's, with their query if that matters, and their content; a web page
            where this is text.
        gated: Repositories whose conditions nobody has accepted.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.repos: dict[str, dict[str, dict[str, str]]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []
        self.faults: list[tuple[str, int | str, int]] = []
        self.files: dict[str, bytes | str] = {}
        self.gated: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def cdn_url(self) -> str:
        """Another host, as the Hub's large files have: its client hides the token from it."""
        return f"http://localhost:{self.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.server_close()

    def fault(self, request: str) -> int | str | None:
        """What is to go wrong with this request."""
        for i, (pattern, action, times) in enumerate(self.faults):
            if times and re.search(pattern, request):
                self.faults[i] = (pattern, action, times - 1)
                return action
        return None

    def keep(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        (self.folder / digest).write_bytes(content)
        return digest

    def new_branch(self) -> dict[str, str]:
        """What the Hub puts into a repository that is created."""
        return {".gitattributes": self.keep(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no fault of the server's."""


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Be silent."""

    def reply(self, status: int, content: bytes | Any = b"", **headers: str) -> None:
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **headers}
        if self.action == "corrupt":
            content = bytes(255 - byte for byte in content)
        start = 0
        if status == 200 and (asked := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            status, start = 206, int(asked.group(1))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content) - start), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.action == "cut":
            self.wfile.write(content[start : (start + len(content)) // 2])
            self.close_connection = True
            return
        self.wfile.write(content[start:])

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        self.reply(status, {"error": message}, **{"X-Error-Code": code, "X-Error-Message": message})

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.server.requests.append(request)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.action = self.server.fault(request)
        if isinstance(self.action, int):
            return self.refuse(self.action, message="injected")
        if self.action == "cut" and self.command != "GET":
            self.close_connection = True
            return self.connection.close()
        for address in (self.path, path):
            if address in self.server.files:
                content = self.server.files[address]
                kind = "text/html; charset=utf-8" if isinstance(content, str) else "application/octet-stream"
                return self.reply(200, content.encode() if isinstance(content, str) else content, Content_Type=kind)
        for pattern, handle in ROUTES:
            if found := re.fullmatch(pattern, request):
                if self.command in ("POST", "PUT") and "/lfs/" not in path and not self.authorized():
                    return self.refuse(401, message="Invalid credentials in Authorization header")
                return handle(self, body, **found.groupdict())
        return self.refuse(404, message=f"no such address: {request}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def branch(self, repo: str, revision: str) -> dict[str, str] | None:
        if repo not in self.server.repos or (self.server.private[repo] and not self.authorized()):
            self.refuse(401, "RepoNotFound", "Repository not found")  # as the Hub does, so as not to tell
            return None
        if repo in self.server.gated:
            self.refuse(403, "GatedRepo", f"Access to model {repo} is restricted")
            return None
        for name, files in self.server.repos[repo].items():
            if revision in (name, commit_of(files)):
                return files
        self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        answer = {"url": f"{self.server.url}/{repo}", "id": "1"}
        if repo in self.server.repos:
            return self.reply(409, {**answer, "error": "You already created this model repo"})
        self.server.repos[repo] = {"main": self.server.new_branch()}
        self.server.private[repo] = asked.get("visibility") == "private"
        self.reply(200, answer)

    def create_branch(self, body: bytes, repo: str, revision: str) -> None:
        branches = self.server.repos[repo]
        if revision in branches:
            return self.refuse(409, message="Reference already exists")
        branches[revision] = dict(branches["main"])
        self.reply(200, {})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if self.branch(repo, revision) is not None:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.reply(200, {"files": files})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        objects: list[dict[str, Any]] = []
        for wanted in json.loads(body)["objects"]:
            href = f"{self.server.url}/lfs/{wanted['oid']}"
            missing = not (self.server.folder / wanted["oid"]).exists()
            objects.append({**wanted, **({"actions": {"upload": {"href": href}}} if missing else {})})
        self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        self.reply(200 if self.server.keep(body) == oid else 400)

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        files = self.branch(repo, revision)
        if files is None:
            return
        lines = [json.loads(line) for line in body.splitlines()]
        new = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                new[value["path"]] = self.server.keep(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                assert (self.server.folder / value["oid"]).exists()
                new[value["path"]] = value["oid"]
        pull_request = "create_pr=1" in urlsplit(self.path).query
        self.server.repos[repo]["refs/pr/1" if pull_request else revision] = new
        address = f"{self.server.url}/{repo}"
        pr = {"pullRequestUrl": f"{address}/discussions/1"} if pull_request else {}
        self.reply(200, {"commitUrl": f"{address}/commit/{commit_of(new)}", "commitOid": commit_of(new), **pr})

    def model_info(self, body: bytes, repo: str, revision: str = "main") -> None:
        if (files := self.branch(repo, revision)) is not None:
            siblings = [{"rfilename": name} for name in files]
            self.reply(200, {"id": repo, "sha": commit_of(files), "private": False, "tags": [], "siblings": siblings})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        if (files := self.branch(repo, revision)) is not None:
            sizes = {name: (self.server.folder / digest).stat().st_size for name, digest in files.items()}
            self.reply(200, [{"type": "file", "path": name, "size": sizes[name], "oid": files[name]} for name in files])

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        files = self.branch(repo, revision)
        if files is None:
            return
        commit = {"X-Repo-Commit": commit_of(files)}
        if name not in files:
            return self.reply(404, **{"X-Error-Code": "EntryNotFound", **commit})
        content = (self.server.folder / files[name]).read_bytes()
        if not name.endswith((".safetensors", ".png")):
            return self.reply(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', **commit)
        linked = {"X-Linked-ETag": f'"{files[name]}"', "X-Linked-Size": str(len(content))}
        self.reply(302, Location=f"{self.server.cdn_url}/cdn/{files[name]}", **linked, **commit)

    def cdn(self, body: bytes, oid: str) -> None:
        assert "Authorization" not in self.headers
        self.reply(200, (self.server.folder / oid).read_bytes(), ETag=f'"{oid}"')

    def validate_yaml(self, body: bytes) -> None:
        self.reply(200, {"errors": [], "warnings": []})


def commit_of(files: dict[str, str]) -> str:
    return hashlib.sha1(json.dumps(files, sort_keys=True).encode()).hexdigest()


REPO = "(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("POST /api/repos/create", Handler.create),
    (f"POST /api/models/{REPO}/branch/(?P<revision>.+)", Handler.create_branch),
    (f"POST /api/models/{REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    (f"POST /{REPO}.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT /lfs/(?P<oid>[0-9a-f]+)", Handler.lfs_put),
    (f"POST /api/models/{REPO}/commit/(?P<revision>.+)", Handler.commit),
    (f"GET /api/models/{REPO}", Handler.model_info),
    (f"GET /api/models/{REPO}/revision/(?P<revision>.+)", Handler.model_info),
    (f"GET /api/models/{REPO}/tree/(?P<revision>[^/]+)", Handler.tree),
    (f"(?:GET|HEAD) /{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.resolve),
    ("(?:GET|HEAD) /cdn/(?P<oid>[0-9a-f]+)", Handler.cdn),
    ("POST /api/validate-yaml", Handler.validate_yaml),
]
