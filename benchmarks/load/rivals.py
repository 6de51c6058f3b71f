"""Other ways for the same bytes: a plain socket, and a file in the page cache."""

from __future__ import annotations

import socket
import tempfile
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.figures import Results, median_s
from benchmarks.load.sources import weights
from benchmarks.processes import another_process, ready
from benchmarks.serving import HOST


def other_ways(nbytes: int, rounds: int) -> Results:
    """The same bytes through a socket, and from a file in the page cache into memory that is there
    already.
    """
    destination = torch.zeros(nbytes, dtype=torch.uint8)
    with another_process(__name__, "send", str(nbytes)) as (_, port):
        stream = median_s(lambda: _receive(int(port), destination), rounds)
    results = {"socket_gb_per_s": nbytes / 1e9 / stream}
    tensors = weights("blocks", nbytes, 500)
    with tempfile.TemporaryDirectory(prefix="engines-bench-") as folder:
        path = Path(folder) / "weights.safetensors"
        save_file(tensors, path)

        def read_file() -> None:
            for name, tensor in load_file(path).items():
                tensors[name].copy_(tensor)

        results["safetensors_gb_per_s"] = nbytes / 1e9 / median_s(read_file, rounds)
    return results


def send(nbytes: str) -> None:
    """To each client, again and again, until standard input ends."""
    block = memoryview(bytearray(min(int(nbytes), 64 << 20)))
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            while True:
                peer, _ = listener.accept()
                with peer:
                    left = int(nbytes)
                    while left:
                        part = block[: min(left, len(block))]
                        peer.sendall(part)
                        left -= len(part)

        threading.Thread(target=serve, daemon=True).start()
        ready(listener.getsockname()[1])


def _receive(port: int, into: torch.Tensor) -> None:
    view = into.numpy().data
    with socket.create_connection((HOST, port)) as peer:
        while view:
            view = view[peer.recv_into(view, min(len(view), 4 << 20)) :]
