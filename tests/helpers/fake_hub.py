# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A stand-in for the Hub on this machine: the part of its HTTP API that uploads and downloads use, with repositories in
memory, a record of every request, and failures on demand.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

from .local_server import LocalServer


USER = "someone"


@dataclass
class Repository:
    """Files by name and branch, and the commits made."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[dict] = field(default_factory=list)

    def head(self, branch: str) -> str:
        """Return the id of the last commit that changed a branch."""
        numbers = [n for n, commit in enumerate(self.commits, 1) if commit["branch"] == branch]
        return f"{numbers[-1] if numbers else 0:040d}"

    def branch_at(self, revision: str) -> str:
        """
        Return the branch whose last commit a revision is; clients ask for a branch first, and then for what it named.
        """
        return next((branch for branch in self.branches if self.head(branch) == revision), revision)


@dataclass
class FakeHub:
    """What the server knows, and what it was asked; `failures` are served before anything else."""

    token: str
    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, dict, bytes]] = field(default_factory=list)
    #: `(part of "METHOD path", status or "drop", how often)`
    failures: list[list] = field(default_factory=list)
    #: The reason it gives for failures with a status.
    reason: str = "as asked"

    def add(self, name: str, files: dict[str, bytes]) -> None:
        """Make a repository that holds files already."""
        first = {"branch": "main", "is_pr": False, "files": files, "deleted": [], "summary": "initial commit"}
        self.repositories[name] = Repository(False, {"main": dict(files)}, [first])

    def downloads(self, name: str) -> set[str]:
        """Return the files of a repository whose content was asked for."""
        asked = [path.split("?")[0] for method, path, _, _ in self.requests if method == "GET"]
        pattern = re.compile(rf"/{re.escape(name)}/resolve/[^/]+/(.+)")
        return {unquote(found[1]) for path in asked if (found := pattern.fullmatch(path))}

    def fail(self, part: str, status: int | str, times: int = 1) -> None:
        """Answer the next `times` requests whose `METHOD path` holds `part` with a status, or drop the connection."""
        self.failures.append([part, status, times])

    def failure(self, request: str) -> int | str | None:
        """Return what is to happen to a request, if anything."""
        for entry in self.failures:
            if entry[0] in request and entry[2] > 0:
                entry[2] -= 1
                return entry[1]
        return None

    def received(self) -> bytes:
        """
        Return every byte of content that clients sent, files of commits decoded, credentials in headers left out.
        """
        parts = []
        for method, path, _, body in self.requests:
            parts += [path.encode(), body]
            if method == "POST" and "/commit/" in path:
                entries = map(json.loads, filter(None, body.decode().split("\n")))
                parts += [base64.b64decode(entry["value"]["content"]) for entry in entries if entry["key"] == "file"]
        return b"\n".join(parts)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are written apart, and the second would wait for the receipt of the first.
    disable_nagle_algorithm = True
    hub: FakeHub

    def log_message(self, *arguments) -> None:
        pass

    def _answer(
        self, content=None, status: int = 200, raw: bytes | None = None, revision: str = "0" * 40, code: str = ""
    ) -> None:
        body = raw if raw is not None else json.dumps({} if content is None else content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if raw is None else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", revision)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("ETag", '"' + hashlib.sha256(body).hexdigest() + '"')
        if status == 429:
            self.send_header("Retry-After", "7")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(
            (self.command, self.path, {name.lower(): value for name, value in self.headers.items()}, body)
        )
        failure = self.hub.failure(f"{self.command} {path}")
        if failure == "drop":
            self.close_connection = True
            self.connection.close()
            return
        if failure is not None:
            self._answer({"error": self.hub.reason}, int(failure))
            return
        if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._answer({"error": "Invalid credentials"}, 401)
            return
        self._route(path, body)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _serve

    def _route(self, path: str, body: bytes) -> None:
        hub, parts = self.hub, path.strip("/").split("/")
        if path == "/api/whoami-v2":
            self._answer({"name": USER, "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or USER}/{asked['name']}"
            if name in hub.repositories:
                self._answer({"error": "exists", "url": f"{hub.endpoint}/{name}", "id": name}, 409)
                return
            hub.repositories[name] = Repository(asked.get("visibility", asked.get("private")) in (True, "private"))
            self._answer({"url": f"{hub.endpoint}/{name}", "id": name})
        elif path.startswith("/lfs/"):
            hub.blobs[parts[1]] = body
            self._answer()
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [
                {**each, "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{each['oid']}", "header": {}}}}
                for each in objects
            ]
            self._answer({"transfer": "basic", "objects": actions})
        elif parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in hub.repositories:
            self._repository(hub.repositories["/".join(parts[2:4])], "/".join(parts[2:4]), parts[4:], body)
        elif parts[2:3] == ["resolve"] and "/".join(parts[:2]) in hub.repositories:
            self._download(hub.repositories["/".join(parts[:2])], parts[3], "/".join(parts[4:]))
        else:
            self._answer({"error": "Repository not found"}, 404)

    def _repository(self, repository: Repository, name: str, parts: list[str], body: bytes) -> None:
        verb, branch = (parts + ["", ""])[:2]
        branch = repository.branch_at(branch)
        if verb == "branch":
            repository.branches.setdefault(branch, dict(repository.branches["main"]))
            self._answer()
        elif (
            verb in ("commit", "preupload", "tree", "revision", "xet-write-token")
            and branch not in repository.branches
        ):
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif verb == "preupload":
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in files
            ]
            self._answer({"files": [mode | {"shouldIgnore": False, "oid": None} for mode in modes]})
        elif verb == "commit":
            self._commit(repository, name, branch, body)
        elif verb == "tree":
            within = "".join(f"{part}/" for part in parts[2:])
            files = {path: data for path, data in repository.branches[branch].items() if path.startswith(within)}
            self._answer(
                [{"type": "file", "path": path, "size": len(data), "oid": "0" * 40} for path, data in files.items()]
            )
        else:
            branch = branch if verb == "revision" else "main"
            siblings = [{"rfilename": path} for path in repository.branches[branch]]
            facts = {"id": name, "sha": repository.head(branch), "private": bool(repository.private)}
            self._answer(facts | {"siblings": siblings})

    def _download(self, repository: Repository, revision: str, name: str) -> None:
        branch = repository.branch_at(revision)
        if branch not in repository.branches:
            self._answer({"error": "No such revision"}, 404, code="RevisionNotFound")
        elif name not in repository.branches[branch]:
            self._answer({"error": "No such file"}, 404, revision=repository.head(branch), code="EntryNotFound")
        else:
            self._answer(raw=repository.branches[branch][name], revision=repository.head(branch))

    def _commit(self, repository: Repository, name: str, branch: str, body: bytes) -> None:
        files, commit = dict(repository.branches[branch]), {"branch": branch, "files": {}, "deleted": []}
        for line in filter(None, body.decode().split("\n")):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                commit["summary"] = value["summary"]
                if value.get("parentCommit", repository.head(branch)) != repository.head(branch):
                    self._answer({"error": "The branch has moved"}, 412)
                    return
            elif entry["key"] == "file":
                commit["files"][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                commit["files"][value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                commit["deleted"].append(value["path"])
                files.pop(value["path"])
        repository.commits.append(commit)
        repository.branches[branch] = files | commit["files"]
        number = f"{len(repository.commits):040d}"
        url = f"{self.hub.endpoint}/{name}"
        done = {"commitOid": number, "commitUrl": f"{url}/commit/{number}", "hookOutput": "", "success": True}
        self._answer(done)


@contextmanager
def serve_hub(token: str = "hf_" + "x" * 34) -> Iterator[FakeHub]:
    """Run the stand-in while the block runs."""
    hub = FakeHub(token)
    with LocalServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub})).running() as server:
        hub.endpoint = server.url
        yield hub
