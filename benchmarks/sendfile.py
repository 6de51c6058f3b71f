"""Both ends of a file that an HTTP server sends with sendfile, as nginx does."""

from __future__ import annotations

import http.client
import os
from http.server import BaseHTTPRequestHandler
from pathlib import Path


class SendsFiles(BaseHTTPRequestHandler):
    """Keeps its connections, and writes no log."""

    protocol_version = "HTTP/1.1"

    def send_file(self, path: Path) -> None:
        """As the answer."""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            self.wfile.flush()
            sent = 0
            while sent < size:
                sent += os.sendfile(self.connection.fileno(), file.fileno(), sent, size - sent)

    def log_message(self, format: str, *args: object) -> None:
        pass


def fill(memory: memoryview, answer: http.client.HTTPResponse) -> None:
    """With the next bytes of the answer. ConnectionError where it has fewer."""
    while memory:
        read = answer.readinto(memory)
        if not read:
            raise ConnectionError("the answer has ended too early")
        memory = memory[read:]
