"""A safetensors file in memory, which an HTTP server sends with sendfile, as nginx does."""

from __future__ import annotations

import http.client
import json
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

from safetensors.torch import save_file

from benchmarks.peers.sets import Tensors
from benchmarks.peers.work import Facts, Load, Work
from benchmarks.sendfile import SendsFiles, fill


@contextmanager
def source(work: Work, tensors: Tensors) -> Iterator[Facts]:
    path = Path(work.folder) / "model.safetensors"
    save_file(tensors, path)
    tensors.clear()  # the file holds them

    class Files(SendsFiles):
        def do_GET(self) -> None:
            self.send_file(path)

    server = ThreadingHTTPServer((work.host, 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"address": server.server_address}


@contextmanager
def reader(work: Work, tensors: Tensors) -> Iterator[Load]:
    """Each load reads the header of the file anew. The connection stays."""
    connection = http.client.HTTPConnection(*work.facts["address"])

    def run() -> None:
        connection.request("GET", "/model.safetensors")
        answer = connection.getresponse()
        header = json.loads(answer.read(struct.unpack("<Q", answer.read(8))[0]))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            _fill(answer, tensors[name].numpy().data, entry["data_offsets"])
        answer.read()

    yield Load(run)
    connection.close()


def _fill(answer: http.client.HTTPResponse, memory: memoryview, offsets: list[int]) -> None:
    if offsets[1] - offsets[0] != len(memory):
        raise ValueError("a tensor has another size than the file says")
    fill(memory, answer)
