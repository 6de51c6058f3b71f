"""Faults with names: a way to etcd that can be cut without anybody being told, an etcd without space, a second version of it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from registry.errors import EtcdError
from registry.etcd import Etcd
from registry.local import find_binary

# Where the set-up unpacks Debian's etcd, so that there is a second version to test on (3.4.23 in Debian 12).
DEBIAN_ETCD = Path(sys.prefix) / "debian-etcd" / "usr" / "bin" / "etcd"


class Proxy:
    """A way to `target` that forwards, or as a black hole keeps its connections open and passes nothing on."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._open = threading.Event()
        self._open.set()
        self._closed = False
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._open.clear()

    def mend(self) -> None:
        """What was sent into the black hole is lost, as over a network: its connections break when they are used again."""
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._open.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._sockets.append(near)
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        self._open.wait()
        try:
            far = socket.create_connection(self._target)
        except OSError:
            near.close()
            return
        self._sockets.append(far)
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._open.wait()
                if self._closed:
                    break
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closed = True
        self._open.set()
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def etcdctl(endpoint: str, *args: str) -> str:
    """Runs etcdctl of the embedded etcd's version."""
    program = Path(find_binary()).with_name("etcdctl")
    command: Sequence[str] = [str(program), "--endpoints", endpoint, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True, env={"ETCDCTL_API": "3"}).stdout


def fill_until_no_space(etcd: Etcd) -> None:
    from registry.kv import Put

    for number in range(10_000):
        try:
            etcd.commit([], [Put(f"/fill/{number}", bytes(256 << 10), 0)])
        except EtcdError:
            return
    raise AssertionError("etcd took everything")
