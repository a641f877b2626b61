"""A web server on this machine for tests of downloads: it can break off, refuse ranges, and answer errors."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Server(http.server.ThreadingHTTPServer):
    """Serves `content[path]`.

    Attributes:
        content: path -> bytes.
        requests: (path, Range header or None) of each request.
        ranges: whether ranges are honoured.
        breaks: after how many bytes the next answers break off, one number for each; then answers are whole.
        errors: status codes of the next answers; then they are as they should be.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.ranges = True
        self.breaks: list[int] = []
        self.errors: list[int] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.requests.append((self.path, asked))
        if server.errors:
            return self.send_error(server.errors.pop(0))
        if self.path not in server.content:
            return self.send_error(404)
        data = server.content[self.path]
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.ranges else 0
        if asked and server.ranges and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:][: server.breaks.pop(0)] if server.breaks else data[start:])

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serve() -> Iterator[Server]:
    """A running server; it stops at the end."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
