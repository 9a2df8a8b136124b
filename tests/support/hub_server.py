"""A hub on the loopback interface: repositories are made, committed to and read as huggingface_hub's client does it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What was pushed, and what was asked."""

    url: str = ""
    token: str = "hf_test"
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """sha256 → what was uploaded as a large file"""
    requests: list[str] = field(default_factory=list)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _send(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            sent = {"Content-Length": str(len(content)), "Content-Type": "application/json", **(headers or {})}
            for name, text in sent.items():
                self.send_header(name, text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _path(self) -> str:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            return path

        def do_POST(self) -> None:
            path, body = self._path(), self._body()
            if path == "/api/validate-yaml":
                return self._send(200, {"errors": [], "warnings": []})
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._send(401, {"error": "Invalid username or password."})
            if path == "/api/repos/create":
                asked = json.loads(body)
                repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
                hub.repositories.setdefault(repo, {})
                return self._send(200, {"url": f"{hub.url}/{repo}", "name": repo})
            if path.endswith(".git/info/lfs/objects/batch"):
                objects = [
                    {**each, "actions": {"upload": {"href": f"{hub.url}/upload/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ]
                return self._send(200, {"transfer": "basic", "objects": objects})
            _, _, _, owner, name, verb, *_ = path.split("/")
            if verb == "preupload":
                files = [
                    {
                        "path": each["path"],
                        "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for each in json.loads(body)["files"]
                ]
                return self._send(200, {"files": files})
            assert verb == "commit"
            for line in body.splitlines():
                part = json.loads(line)
                if part["key"] == "file":
                    content = base64.b64decode(part["value"]["content"])
                elif part["key"] == "lfsFile":
                    content = hub.large[part["value"]["oid"]]
                else:
                    continue
                hub.repositories[f"{owner}/{name}"][part["value"]["path"]] = content
            return self._send(200, {"commitUrl": f"{hub.url}/{owner}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

        def do_PUT(self) -> None:
            oid, content = self._path().rpartition("/")[2], self._body()
            assert hashlib.sha256(content).hexdigest() == oid
            hub.large[oid] = content
            self._send(200, {})

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self._path()
            parts = path.strip("/").split("/")
            repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
            files = hub.repositories.get(repo)
            if files is None:
                return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            if parts[0] == "api" and "tree" not in parts:
                siblings = [{"rfilename": name} for name in files]
                return self._send(200, {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False})
            if parts[0] == "api":
                if "recursive" not in parse_qs(urlsplit(self.path).query):
                    return self._send(400, {"error": "only recursive"})
                tree = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
                return self._send(200, tree)
            content = files.get("/".join(parts[4:]))
            if content is None:
                return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            etag = hashlib.sha256(content).hexdigest()
            return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    return Handler


@contextlib.contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub for the length of the context."""

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

    hub = Hub()
    server = Quiet(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
