"""A web server that can be told to misbehave."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """``files``: path -> (content, ETag). What it does wrong is switched on by the attributes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, tuple[bytes, str | None]] = {}
        self.ranges, self.lengths = True, True  # knows Range; says Content-Length
        self.status: list[int] = []  # of the next answers
        self.drop_after: list[int] = []  # bytes behind which the next whole answers break
        self.lie = 0  # bytes more than there are
        self.packed = ""  # Content-Encoding of all answers
        self.pause = 0.0  # seconds before each 16 KiB
        self.silent: list[float] = []  # seconds before the next whole answers' contents
        self.redirect: dict[str, str] = {}
        self.after: dict[str, tuple[bytes, str | None]] = {}  # what the files become with their last byte
        self.asked: Counter[str] = Counter()  # whole answers, or such from some byte to the end
        self.headers: list[dict[str, str]] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        self.host = f"127.0.0.1:{self.server_address[1]}"

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that hang up are what is tested


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.0"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        server.headers.append(dict(self.headers))
        if server.status and (status := server.status.pop(0)) != 200:
            return self.send_error(status)
        if path in server.redirect:
            self.send_response(302)
            self.send_header("Location", server.redirect[path])
            return self.end_headers()
        if path not in server.files:
            return self.send_error(404)
        content, etag = server.files[path]
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if server.ranges else None
        first, last = (int(span[1]), int(span[2] or len(content))) if span else (0, len(content))
        body = content[first : last + 1]
        if span and first >= len(content):
            return self.send_error(416)
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(content) + server.lie}")
        if server.lengths:
            self.send_header("Content-Length", str(len(body) + (server.lie if last else 0)))
        if server.packed:
            self.send_header("Content-Encoding", server.packed)
        if etag:
            self.send_header("ETag", etag)
        self.end_headers()
        if self.headers.get("Range") == "bytes=0-0":  # a question, whose asker hangs up
            return self.wfile.write(body) and None
        if server.silent:
            time.sleep(server.silent.pop(0))
        if server.drop_after:
            body = body[: server.drop_after.pop(0)]
        for low in range(0, len(body), 1 << 14):
            time.sleep(server.pause)
            self.wfile.write(body[low : low + (1 << 14)])
        server.asked[path] += not (span and span[2])
        server.files.update(server.after)
        server.after = {}
