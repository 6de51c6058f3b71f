"""A connection to another engine: first some words of both ends, then pieces of memory."""

from __future__ import annotations

import ctypes
import socket
import ssl
import threading
import time
from contextlib import suppress

import numpy as np

from engine_loader.engines.sockets import memory
from engine_loader.engines.sockets.memory import Pieces, pieces_of

_RECORD_NBYTES = 16 << 10  # of TLS: what is shorter is put together
_BUFFER_NBYTES = 1 << 20  # of the kernel, for a connection that does not leave the host
# After a minute of silence the other end's host is asked whether it is there, and is given up when
# it has not answered six times. Its engine may be silent for as long as it likes.
_KEPT_ALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 6}


class Stream:
    """One thread uses it; any other may cut it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._cutting = threading.Lock()
        self._closed = False
        self._until = 0.0

    # -- words

    def begin(self, limit_s: float) -> None:
        """The handshake of TLS if there is one. All until `go_on` takes no longer than the limit,
        in seconds. OSError.
        """
        self._until = time.monotonic() + limit_s
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if isinstance(self._connection, ssl.SSLSocket):
            self._hurry()
            self._connection.do_handshake()

    def say(self, words: bytes) -> None:
        """OSError."""
        self._hurry()
        self._connection.sendall(words)

    def hear(self, nbytes: int) -> bytes:
        """So many; OSError, ConnectionResetError at the end."""
        heard = bytearray()
        while len(heard) < nbytes:
            self._hurry()
            some = self._connection.recv(nbytes - len(heard))
            if not some:
                raise ConnectionResetError("the other end has closed the connection")
            heard += some
        return bytes(heard)

    def _hurry(self) -> None:
        left_s = self._until - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the other end takes too long")
        self._connection.settimeout(left_s)

    def go_on(self) -> None:
        """With long answers to short questions, as long as they take."""
        connection = self._connection
        connection.settimeout(None)
        with suppress(OSError):  # it is broken, which what comes next finds
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEPT_ALIVE.items():
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
            if connection.getsockname()[0] == connection.getpeername()[0]:
                # The kernel's buffers grow with the way. Here there is none, and short ones stay in
                # the processor's cache.
                for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                    connection.setsockopt(socket.SOL_SOCKET, option, _BUFFER_NBYTES)

    # -- pieces of memory

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

    # -- the end

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
