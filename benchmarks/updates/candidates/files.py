"""Files in memory, one for each step, which an HTTP server sends with sendfile as soon as they are
there: of safetensors, and what the module `xor` makes.
"""

from __future__ import annotations

import http.client
import json
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.updates.candidates import Facts, Receiving, Sending, Work
from benchmarks.updates.weights import Tensors

_WAIT_S = 300.0


class Answer:
    """A file that comes over a connection, in order."""

    def __init__(self, connection: http.client.HTTPConnection, number: int) -> None:
        connection.request("GET", f"/{number}")
        self._answer = connection.getresponse()
        self.nbytes = int(self._answer.headers["Content-Length"])

    def read(self, nbytes: int) -> bytearray:
        data = bytearray(nbytes)
        self.fill(memoryview(data))
        return data

    def fill(self, memory: memoryview) -> None:
        while memory:
            read = self._answer.readinto(memory)
            if not read:
                raise ConnectionError("the answer has ended too early")
            memory = memory[read:]

    def end(self) -> None:
        """The connection can be used again."""
        self._answer.read()


@contextmanager
def serving(work: Work, write: Callable[[Path], None]) -> Iterator[Sending]:
    """`write` makes the file of a step."""
    there = threading.Condition()
    paths: dict[int, Path] = {}

    class Files(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            number = int(self.path.strip("/"))
            with there:
                there.wait_for(lambda: number in paths, _WAIT_S)
            with paths[number].open("rb") as file:
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

    def send(number: int) -> None:
        path = Path(work.folder) / f"{write.__module__.rpartition('.')[2]}.{number}"
        write(path)
        with there:
            for old in paths.values():
                old.unlink(missing_ok=True)
            paths[number] = path
            there.notify_all()

    server = ThreadingHTTPServer((work.host, 0), Files)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Sending({"address": server.server_address}, send)
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def asking(work: Work, fill: Callable[[Answer], None], keeps: bool) -> Iterator[Receiving]:
    """`fill` makes the tensors of the file of a step."""
    connection = http.client.HTTPConnection(*work.facts["address"])

    def receive(number: int) -> Facts:
        answer = Answer(connection, number)
        fill(answer)
        answer.end()
        return {"nbytes": answer.nbytes}

    yield Receiving(receive, keeps)
    connection.close()


@contextmanager
def send(work: Work, tensors: Tensors) -> Iterator[Sending]:
    def write(path: Path) -> None:
        save_file(tensors, path)

    with serving(work, write) as sending:
        yield sending


@contextmanager
def receive(work: Work, tensors: Tensors) -> Iterator[Receiving]:
    memory = {
        name: tensor.view(-1).view(torch.uint8).numpy().data for name, tensor in tensors.items()
    }

    def fill(answer: Answer) -> None:
        (length,) = struct.unpack("<Q", answer.read(8))
        header = json.loads(answer.read(length))
        header.pop("__metadata__", None)
        for name, _ in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            answer.fill(memory[name])

    with asking(work, fill, keeps=False) as receiving:
        yield receiving
