"""What may answer at the address of a transfer engine: a server that speaks Mooncake's handshake,
or nearly.

A reader sends its own description and expects the peer's: eight bytes with the length of what
follows, little-endian, a byte with the kind of the message, and JSON. Then the peer closes the
connection.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from engine_loader import MooncakeEngine

METADATA = 1  # the kind of message
Behaviour = Callable[[socket.socket], None]


class Impostor(MooncakeEngine):
    """Publishes its memory under the session of another process."""

    def __init__(self, session_id: str) -> None:
        super().__init__("127.0.0.1")
        self._session_id = session_id


def framed(body: bytes, kind: int = METADATA, length: int | None = None) -> bytes:
    return struct.pack("<QB", len(body) + 1 if length is None else length, kind) + body


def described(**fields: Any) -> bytes:
    """The description of an engine whose data port is closed, with some fields of it changed."""
    where = "127.0.0.1:1"
    buffers = [{"addr": 4096, "length": 1 << 40, "name": where}]
    description = {
        "buffers": buffers,
        "name": where,
        "protocol": "tcp",
        "rdma_server_name": "",
        "tcp_data_host": "127.0.0.1",
        "tcp_data_port": 1,
        "tcp_proto_version": 2,
        "timestamp": "2026-11-28 07:21:01.780050",
        **fields,
    }
    return framed(json.dumps(description).encode())


def says(*parts: bytes, pause_s: float = 0.0) -> Behaviour:
    """Sends these one after the other, and closes the connection."""

    def behave(connection: socket.socket) -> None:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause_s)

    return behave


def keeps_still(connection: socket.socket) -> None:
    """Until the reader has enough."""
    while connection.recv(1 << 16):
        pass


def says_and_keeps_still(part: bytes) -> Behaviour:
    def behave(connection: socket.socket) -> None:
        connection.sendall(part)
        keeps_still(connection)

    return behave


def drips(connection: socket.socket) -> None:
    """A byte now and then, of a message that is as long as may be."""
    for byte in framed(b"", length=1 << 20) + bytes(1 << 20):
        connection.sendall(bytes([byte]))
        time.sleep(0.02)


class HostilePeer:
    """Answers each contact by the next of its behaviours, the last one for ever."""

    def __init__(self, *behaviours: Behaviour) -> None:
        self._behaviours = list(behaviours)
        self._server = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self._met = threading.Semaphore(0)
        self.session_id = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def wait_until_met(self) -> None:
        """Until somebody has asked once more."""
        assert self._met.acquire(timeout=60)

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                behave = (
                    self._behaviours.pop(0) if len(self._behaviours) > 1 else self._behaviours[0]
                )
                self._connections.append(connection)
                threading.Thread(
                    target=self._answer, args=(connection, behave), daemon=True
                ).start()

    def _answer(self, connection: socket.socket, behave: Behaviour) -> None:
        with suppress(OSError), connection:
            (length,) = struct.unpack("<Q", connection.recv(8, socket.MSG_WAITALL).ljust(8, b"\0"))
            connection.recv(length, socket.MSG_WAITALL)
            self._met.release()
            behave(connection)

    def close(self) -> None:
        for closing in (self._server, *self._connections):
            with suppress(OSError):
                closing.shutdown(socket.SHUT_RDWR)
            closing.close()

    def __enter__(self) -> HostilePeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
