"""A connection to etcd whose bytes are counted, and a watcher behind it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import closing

from engine_registry import RankJoined, Registry
from engine_registry.etcd.local import LocalEtcd


class Wire:
    """A way to etcd that counts what comes back over it, gRPC and HTTP/2 included."""

    def __init__(self, server: LocalEtcd) -> None:
        self.nbytes = 0
        self.seen = 0
        self.all_seen = threading.Condition()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._server = server
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._server.port))
                threading.Thread(target=self._pump, args=(near, far, False), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.nbytes += len(data) * counted
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def one_more(self) -> None:
        with self.all_seen:
            self.seen += 1
            self.all_seen.notify_all()

    def wait_until_quiet(self, events: int) -> None:
        with self.all_seen:
            self.all_seen.wait_for(lambda: self.seen >= events, 60)

    def close(self) -> None:
        self._listener.close()


@contextlib.contextmanager
def counted_watch(server: LocalEtcd) -> Iterator[Wire]:
    """One watcher of all instances, as `engines watch` is one."""
    with (
        closing(Wire(server)) as wire,
        Registry.connect(wire.endpoint) as registry,
        registry.watch() as watch,
    ):

        def read() -> None:
            for event in watch:
                if isinstance(event, RankJoined):
                    wire.one_more()

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield wire
        finally:
            watch.stop()
            reader.join()
