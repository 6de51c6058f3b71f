"""Files in memory, one for each step, which an HTTP server sends with sendfile as soon as they are
there: of safetensors, and what the module `xor` makes.
"""

from __future__ import annotations

import http.client
import json
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.sendfile import SendsFiles, fill
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
        fill(memory, self._answer)

    def end(self) -> None:
        """The connection can be used again."""
        self._answer.read()


@contextmanager
def serving(work: Work, write: Callable[[Path], None]) -> Iterator[Sending]:
    """`write` makes the file of a step."""
    there = threading.Condition()
    paths: dict[int, Path] = {}

    class Files(SendsFiles):
        def do_GET(self) -> None:
            number = int(self.path.strip("/"))
            with there:
                there.wait_for(lambda: number in paths, _WAIT_S)
            self.send_file(paths[number])

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
