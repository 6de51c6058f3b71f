"""SGLang's way, as the design page describes it, to compare with: one process with a dict behind
HTTP, one GET a rank, every answer rendered anew.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GET = "/get_transfer_engine_info?rank="
HOST = "127.0.0.1"


@contextmanager
def bootstrap_server(infos: Mapping[int, object]) -> Iterator[int]:
    """Its port."""

    class Server(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            rank = int(self.path.removeprefix(GET))
            answer = {"rank": rank, "remote_instance_transfer_engine_info": infos[rank]}
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer((HOST, 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
