"""A connection to another engine, as pieces of memory go through it."""

from __future__ import annotations

import ctypes
import socket
import ssl
import struct
import threading
from contextlib import suppress

import numpy as np

from engine_loader.engines.sockets import memory
from engine_loader.engines.sockets.memory import Pieces, pieces_of

_RECORD_NBYTES = 16 << 10  # of TLS: what is shorter is put together
_BUFFER_NBYTES = 1 << 20  # of the kernel, for a connection that does not leave the host


class Stream:
    """One thread uses it; any other may cut it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._cutting = threading.Lock()
        self._closed = False

    def begin(self, limit_s: float) -> None:
        """The handshake of TLS if there is one. Until `go_on` nothing takes longer than the limit,
        in seconds. OSError.
        """
        self._connection.settimeout(None)
        self._limit(limit_s)
        if isinstance(self._connection, ssl.SSLSocket):
            self._connection.do_handshake()

    def go_on(self) -> None:
        """For long answers to short questions, as long as they take."""
        connection = self._connection
        self._limit(0)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if connection.getsockname()[0] == connection.getpeername()[0]:
            # The kernel's buffers grow with the way. Here there is none, and short ones stay in the
            # processor's cache.
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                connection.setsockopt(socket.SOL_SOCKET, option, _BUFFER_NBYTES)

    def _limit(self, seconds: float) -> None:
        """Of each call of the kernel, which a timeout of Python's would not limit."""
        interval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._connection.setsockopt(socket.SOL_SOCKET, option, interval)

    def send(self, pieces: Pieces) -> None:
        """OSError."""
        if isinstance(self._connection, ssl.SSLSocket):
            self._send_encrypted(self._connection, pieces)
        else:
            memory.send(self._connection.fileno(), pieces)

    def receive(self, pieces: Pieces) -> None:
        """OSError; ConnectionResetError at the end."""
        if isinstance(self._connection, ssl.SSLSocket):
            self._receive_encrypted(self._connection, pieces)
        else:
            memory.receive(self._connection.fileno(), pieces)

    def send_bytes(self, some: bytes) -> None:
        self.send(pieces_of(np.frombuffer(some, np.uint8)))

    def receive_bytes(self, nbytes: int) -> bytes:
        buffer = np.empty(nbytes, np.uint8)
        self.receive(pieces_of(buffer))
        return buffer.tobytes()

    def _send_encrypted(self, connection: ssl.SSLSocket, pieces: Pieces) -> None:
        short = bytearray()
        for addr, nbytes in pieces[pieces[:, 1] > 0].tolist():
            view = _view(addr, nbytes)
            if nbytes < _RECORD_NBYTES:
                short += view
            if short and (nbytes >= _RECORD_NBYTES or len(short) >= _RECORD_NBYTES):
                connection.sendall(short)
                short = bytearray()
            if nbytes >= _RECORD_NBYTES:
                connection.sendall(view)
        connection.sendall(short)

    def _receive_encrypted(self, connection: ssl.SSLSocket, pieces: Pieces) -> None:
        for addr, nbytes in pieces[pieces[:, 1] > 0].tolist():
            view = _view(addr, nbytes)
            while view:
                got = connection.recv_into(view)
                if not got:
                    raise ConnectionResetError("the other end has closed the connection")
                view = view[got:]

    def cut(self) -> None:
        """Whoever sends or receives gets an OSError at once."""
        with self._cutting:
            if not self._closed:
                with suppress(OSError):
                    socket.socket.shutdown(self._connection, socket.SHUT_RDWR)

    def close(self) -> None:
        """By the thread that uses it. Nobody cuts another connection that gets its number."""
        with self._cutting:
            self._closed = True
            self._connection.close()


def _view(addr: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_char * nbytes).from_address(addr)).cast("B")
