"""A stand-in for the Hugging Face hub on this machine: makes repositories, takes commits, gives files."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "5" * 40


class Hub(ThreadingHTTPServer):
    """``files``: repository -> name -> content; ``private``: repository -> whether it is. ``token`` may write for the
    user ``me``, and no other.
    """

    daemon_threads = True

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.token = token
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        parts = self.path.strip("/").partition("?")[0].split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.server.files.get(repo)
        if files is None:
            self._say(404, {"error": "no such repository"}, {"X-Error-Code": "RepoNotFound"})
        elif parts[0] == "api":
            siblings = [{"rfilename": name} for name in files]
            self._say(200, {"id": repo, "sha": SHA, "siblings": siblings, "private": self.server.private[repo]})
        elif (name := "/".join(parts[4:])) in files:
            content = files[name]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self._send(200, content, {"ETag": etag, "X-Repo-Commit": SHA})
        else:
            self._say(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server, path = self.server, self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {server.token}":
            return self._say(401, {"error": "no token"})
        if path == "/api/repos/create":
            asked = json.loads(content)
            user = asked.get("organization") or "me"
            repo = f"{user}/{asked['name']}"
            if user != "me":
                return self._say(403, {"error": "not yours"})
            if repo in server.files:
                return self._say(409, {"error": "there already"})
            server.files[repo], server.private[repo] = {}, asked.get("visibility") == "private"
            return self._say(200, {"url": f"{server.url}/{repo}"})
        if path == "/api/validate-yaml":  # of a model card
            return self._say(200, {"errors": [], "warnings": []})
        repo = "/".join(path.split("/")[3:5])
        if repo not in server.files:
            return self._say(404, {"error": "no such repository"}, {"X-Error-Code": "RepoNotFound"})
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(content)["files"]]
            answers = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            return self._say(200, {"files": answers})
        for line in filter(None, content.splitlines()):
            entry = json.loads(line)
            if entry["key"] == "file":
                server.files[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        url = f"{server.url}/{repo}/commit/{SHA}"
        return self._say(200, {"success": True, "commitOid": SHA, "commitUrl": url, "hookOutput": ""})

    def _say(self, status: int, answer: dict, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
